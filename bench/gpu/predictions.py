"""What a decoding step of the CUDA engine should take at batch 1, by arithmetic that was written down before any card
ran it:

    us(N) = bytes(N) / bandwidth + phase * kernels that work + idle * kernels that find nothing to do

bytes(N) are those of bench/ideal.py, bandwidth is the data sheet's. A dependent phase takes 2.4 to 2.8 us beyond its
bytes in what others have published, an idle kernel about 1 us. The kernels are those that csrc/engine/cuda_pass.cpp
and flexidepth_ext/cuda_decode.py queue, whatever is skipped. `python -m bench.gpu.predictions` prints the tables of
docs/gpu-notes.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexidepth.config import FlexiDepthConfig

from ..ideal import bytes_per_token, ideal_speedup
from ..models import model_config
from .costs import CostRow
from .engine_timing import DecodeRow

MODELS = ("llama-3-8b", "smollm2-135m")
CONTEXT = 128  # tokens, of the tables
NOT_MEASURED = "not measured yet"
_PEAK = {"H200": 4.8e12, "H100": 3.35e12}  # bytes/s of data sheets, by what a device's name holds
_PHASE = (2.4, 2.8)  # us
_IDLE = 1.0  # us
_BARRIER = 1.0  # us, of a whole grid: a guess that grid_barrier_1 of costs.cu replaces
_IF_NOT_TAKEN = (0.7, 1.4)  # us, published of an L40S and a 3090


@dataclass(frozen=True)
class Kernels:
    """How many of a step, or of a part of one, have work to do, and how many leave at once."""

    working: int
    idle: int = 0

    @property
    def all(self) -> int:
        """How many are queued."""
        return self.working + self.idle

    def __add__(self, other: Kernels) -> Kernels:
        return Kernels(self.working + other.working, self.idle + other.idle)

    def __mul__(self, count: int) -> Kernels:
        return Kernels(self.working * count, self.idle * count)


ONCE = Kernels(5)  # embed, rope_table, lm_head, sample, advance
PLAIN_LAYER = Kernels(5)  # [Q, K, V] [attention] [O] [gate, up] [down]
# [router's code] [Q; K, V; adapter's gate, up] [attention] [O] [gate, up] [down; adapter's down]
LAYER_THAT_RUNS = Kernels(6)
LAYER_THAT_SKIPS = Kernels(3, 3)  # attention, O and gate/up have no row


@dataclass(frozen=True)
class Device:
    """What a prediction assumes. bandwidth: bytes/s. phase: us of a dependent phase beyond its bytes, low and high.
    idle: us of a kernel that finds nothing to do."""

    name: str
    bandwidth: float
    phase: tuple[float, float] = _PHASE
    idle: float = _IDLE


@dataclass(frozen=True)
class Prediction:
    """Of a step at batch 1, each with few and with many microseconds a phase. skipped: layers; None = the dense model.
    of_ideal: speedup over the dense step, as a share of the bytes' ratio."""

    skipped: int | None
    ms: tuple[float, float]
    speedup: tuple[float, float]
    of_ideal: tuple[float, float]


@dataclass(frozen=True)
class Beside:
    """A prediction beside what was measured. assumed: where bandwidth and costs are from."""

    assumed: str
    context: int
    skipped: int | None
    ms_low: float
    ms_high: float
    measured_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def data_sheet(name: str) -> Device | None:
    """What the data sheet says of a device, by its name; None where we have not looked."""
    for model, bandwidth in _PEAK.items():
        if model in name:
            return Device(f"{model}'s data sheet", bandwidth)
    return None


def measured_device(costs: Sequence[CostRow], overlap: bool) -> Device | None:
    """The same of this card's own costs; None where one of them is not known."""
    end = "_overlap" if overlap else ""
    found = {row.key: row.median for row in costs if row.median is not None}
    read, phase, idle = (found.get(key) for key in ("read", "phase" + end, "idle_1000" + end))
    if read is None or phase is None or idle is None:
        return None
    return Device("this card's costs", read * 1e9, (phase, phase), idle)


def step_kernels(config: FlexiDepthConfig, skipped: int | None) -> Kernels:
    """Kernels of one step."""
    if skipped is None:
        return ONCE + PLAIN_LAYER * config.num_hidden_layers
    routed = config.num_routed_layers
    layers = PLAIN_LAYER * (config.num_hidden_layers - routed)
    return ONCE + layers + LAYER_THAT_RUNS * (routed - skipped) + LAYER_THAT_SKIPS * skipped


def predict(
    config: FlexiDepthConfig, skipped: int | None, context: int, device: Device
) -> Prediction:
    """A step of 16-bit weights behind `context` tokens."""
    own, dense = (
        [_step_us(config, n, context, device, phase) for phase in device.phase]
        for n in (skipped, None)
    )
    ideal = 1.0 if skipped is None else ideal_speedup(config, skipped, context=context)
    speedup = dense[0] / own[0], dense[1] / own[1]
    return Prediction(
        skipped,
        (own[0] / 1e3, own[1] / 1e3),
        speedup,
        (speedup[0] / ideal, speedup[1] / ideal),
    )


def beside(
    config: FlexiDepthConfig, rows: Sequence[DecodeRow], devices: Sequence[Device]
) -> list[Beside]:
    """Predictions for the rows of batch 1, one a device."""
    made = []
    for row in rows:
        for device in devices if row.batch == 1 else ():
            ms = predict(config, row.skipped, row.context, device).ms
            made.append(Beside(device.name, row.context, row.skipped, *ms, row.ms))
    return made


def assumed_devices(name: str, costs: Sequence[CostRow], overlap: bool) -> list[Device]:
    """What a device of this name is taken for: its data sheet, and its own costs where they were measured."""
    found = (data_sheet(name), measured_device(costs, overlap))
    return [device for device in found if device is not None]


def prediction_table(names: Sequence[str] = MODELS, context: int = CONTEXT) -> list[str]:
    """Predictions for the devices whose data sheets are known."""
    lines = [
        f"| device | model, context {context} | layers skipped | kernels, of them idle | ms | tok/s | x dense | ideal "
        "| of ideal | outcome |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for label, bandwidth in _PEAK.items():
        for name in names:
            config = model_config(name)
            routed = config.num_routed_layers
            for skipped in (None, 0, 8, routed):
                p = predict(config, skipped, context, Device(label, bandwidth))
                kernels = step_kernels(config, skipped)
                ideal = 1.0 if skipped is None else ideal_speedup(config, skipped, context=context)
                lines.append(
                    f"| {label} | {name} | {'dense' if skipped is None else skipped} | {kernels.all}, {kernels.idle} "
                    f"| {span(p.ms, 3)} | {span((1e3 / p.ms[1], 1e3 / p.ms[0]), 0)} | {span(p.speedup, 3)} "
                    f"| {ideal:.3f} | {span(p.of_ideal, 3)} | {NOT_MEASURED} |"
                )
    return lines


def experiment_table() -> list[str]:
    """What is to be tried, what decides about it, and by how much it should matter."""
    large, small = (model_config(name) for name in MODELS)
    device = Device("H200", _PEAK["H200"])
    phase = sum(device.phase) / 2
    half = large.num_routed_layers // 2
    idle = LAYER_THAT_SKIPS.idle * device.idle
    taken = tuple(sorted(idle - not_taken for not_taken in _IF_NOT_TAKEN))
    query = 2 * large.hidden_size**2
    adapter = 2 * 2 * large.hidden_size * large.adapter_dim  # gate and up, 16 bits

    def saved(config: FlexiDepthConfig, skipped: int, us: float) -> str:
        kernels = step_kernels(config, skipped)
        whole = _step_us(config, skipped, CONTEXT, device, phase)
        return f"{us * kernels.working / whole:.0%}"

    rows = [
        (
            "kernels overlap (programmatic edges)",
            "`phase` against `phase_overlap`; `--engine` times both",
            f"each us less in a phase is {saved(large, half, 1)} of a step of 8B with {half} layers skipped and "
            f"{saved(small, 8, 1)} of SmolLM2's",
        ),
        (
            "prefetch before the gate is known",
            "`phase_overlap`, `read`",
            f"{phase * device.bandwidth / 1e12:.1f} MB pass in one phase's latency, the most that a budget gains; "
            f"the adapter's gate and up are {adapter / 1e6:.1f} MB and Q is {query / 1e6:.1f} MB, fetched for nothing "
            f"they cost {adapter / device.bandwidth * 1e6:.1f} and {query / device.bandwidth * 1e6:.1f} us",
        ),
        (
            "one persistent kernel",
            "`grid_barrier_1` against `phase`",
            f"a barrier of {_BARRIER:.0f} us in place of a phase's {phase:.1f} us would save "
            f"{saved(small, 8, phase - _BARRIER)} of SmolLM2's step and {saved(large, half, phase - _BARRIER)} of 8B's",
        ),
        (
            "IF nodes around a layer's kernels",
            "`if_not_taken`, `if_taken`, `idle_1000`",
            f"a skipped layer's {LAYER_THAT_SKIPS.idle} idle kernels are {idle:.0f} us: with half of the layers "
            f"skipped, a node that is taken must cost less than {span(taken, 1)} us, and no kernels overlap across it",
        ),
    ]
    lines = ["| experiment | decided by | prediction, H200 | outcome |", "|---|---|---|---|"]
    lines += [f"| {what} | {by} | {said} | {NOT_MEASURED} |" for what, by, said in rows]
    return lines


def span(values: Sequence[float], digits: int) -> str:
    """`low` or `low to high`, in ascending order."""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _step_us(
    config: FlexiDepthConfig, skipped: int | None, context: int, device: Device, phase: float
) -> float:
    read = bytes_per_token(config, skipped or 0, context=context, routers=skipped is not None)
    kernels = step_kernels(config, skipped)
    return read / device.bandwidth * 1e6 + phase * kernels.working + device.idle * kernels.idle


if __name__ == "__main__":
    print("\n".join([*prediction_table(), "", *experiment_table()]))
