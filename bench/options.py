"""What to measure, checked before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import ValueOutOfRangeError

from .peers import PEERS
from .reads import STEADY

DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "f16": torch.float16,
    "float32": torch.float32,
    "f32": torch.float32,
}
ROUTINGS = ("random", "fixed", "model")  # or a file with a recorded one
_SPARE = 8  # cache places for warm-up steps
BREAKDOWN_STEPS = 48
_MAX_THREADS = 1024  # the engine's own limit
_MAX_BATCH = 64


@dataclass(frozen=True)
class Setting:
    """What an engine is made of. threads: None on devices other than the CPU."""

    model: str
    device: str
    dtype: torch.dtype
    threads: int | None

    @property
    def dtype_name(self) -> str:
        """As in tables."""
        return str(self.dtype).removeprefix("torch.")

    def fields(self) -> dict[str, Any]:
        """Those of a BenchRow."""
        return {
            "model": self.model,
            "device": self.device,
            "dtype": self.dtype_name,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class BenchOptions:
    """What to measure: every combination of the lists.

    models: checkpoints, or "random:NAME" (bench.models). devices: "cpu", "cuda" or "cuda:1". dtypes: names of DTYPES.
    threads: of the CPU; None = all available. batches: sequences that decode side by side. prompts: tokens of prompts,
    none = no prompt cases. steps: decode steps timed per case, spread over the rounds, 0 = no decode cases. depths:
    tokens in the cache before decoding. skips: numbers of layers, "all" = every number, "quarters" = 0, 1/4, 1/2, 3/4
    and all of the routed ones. shares: of the routed layers that prompt tokens skip, 0 to 1. routing: "random" (each
    token skips exactly so many, drawn), "fixed" (the same layers for every token), "model" (the model's own, its
    thresholds set for so many: a calibrated model) or a file that `generate --routing-out` wrote, which is replayed.
    rounds: turns through all cases. peers: names of bench.peers, or "all". prefer_hub: see `open_checkpoint`.

    Raises:
        ValueOutOfRangeError: a value that cannot be measured; what depends on the model is for `check_fits`.
    """

    models: Sequence[str]
    devices: Sequence[str] = ("cpu",)
    dtypes: Sequence[str] = ("auto",)
    threads: Sequence[int] | None = None
    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (512,)
    steps: int = 128
    depths: Sequence[int] = (128,)
    skips: Sequence[int] | str = "quarters"
    shares: Sequence[float] = (0.0, 0.5, 1.0)
    routing: str = "random"
    rounds: int = 8
    peers: Sequence[str] = field(default_factory=tuple)
    accuracy: bool = False
    memory: bool = True
    breakdown: bool = False
    prefer_hub: bool = False

    def __post_init__(self) -> None:
        _check("models", list(self.models), bool(self.models), "one or more")
        _check(
            "device",
            list(self.devices),
            bool(self.devices)
            and all(re.fullmatch(r"cpu|cuda(:\d+)?", device) for device in self.devices),
            "cpu, cuda or cuda:1",
        )
        wrong = [dtype for dtype in self.dtypes if dtype not in DTYPES]
        for dtype in wrong:
            _check("dtype", dtype, False, f"one of {', '.join(DTYPES)}")
        prompts = [tokens for tokens in self.prompts if tokens]
        _check("prompt", list(self.prompts), all(n >= 0 for n in self.prompts), "0 or more")
        _check("depth", list(self.depths), all(n >= 0 for n in self.depths), "0 or more")
        _check("steps", self.steps, self.steps >= 0, "0 or more")
        _check("rounds", self.rounds, self.rounds >= 1, "1 or more")
        if not prompts and not (self.steps and self.depths):
            raise ValueOutOfRangeError(
                "bench: prompt and steps (-p, -n) are 0; that leaves nothing to measure; raise one of them"
            )
        _check(
            "steps",
            self.steps,
            self.steps == 0 or self.steps >= self.rounds,
            f"0, or {self.rounds} or more: one in each of {self.rounds} rounds",
        )
        percent = [round(share * 100, 6) for share in self.shares]
        _check("shares", percent, all(0 <= p <= 100 for p in percent), "per cents from 0 to 100")
        threads = [1] if self.threads is None else list(self.threads)
        fits = bool(threads) and all(1 <= n <= _MAX_THREADS for n in threads)
        _check("threads", threads, fits, f"numbers from 1 to {_MAX_THREADS}")
        batches = list(self.batches)
        fits = bool(batches) and all(1 <= n <= _MAX_BATCH for n in batches)
        _check("batch", batches, fits, f"numbers from 1 to {_MAX_BATCH}")
        if isinstance(self.skips, str):
            known = self.skips in ("all", "quarters")
            _check("skip", self.skips, known, "numbers, 'all' or 'quarters'")
        else:
            _check("skip", list(self.skips), all(n >= 0 for n in self.skips), "numbers from 0 on")
        recorded = self.routing not in ROUTINGS
        if recorded and not Path(self.routing).is_file():
            _check("routing", self.routing, False, f"{', '.join(ROUTINGS)} or a routing report")
        wrong = [name for name in self.peers if name not in ("all", *PEERS)]
        _check("peers", wrong, not wrong, f"some of {', '.join(PEERS)}, or all")
        if self.peers and self.steps:
            least = min(self.depths, default=1)
            _check("depth", least, least > 0, "1 or more: peers need a token to begin at")

    def settings(self, available_threads: int) -> Iterator[Setting]:
        """Every engine that is needed, in turn."""
        dtypes = list(dict.fromkeys(DTYPES[name] for name in self.dtypes))
        for model in self.models:
            for device in self.devices:
                for dtype in dtypes:
                    if device == "cpu":
                        for threads in self.threads or [available_threads]:
                            yield Setting(model, device, dtype, threads)
                    else:
                        yield Setting(model, device, dtype, None)

    def check_fits(self, config: FlexiDepthConfig) -> list[int]:
        """The numbers of layers to skip; ValueOutOfRangeError where the model has too few layers or positions."""
        limit = config.max_position_embeddings
        for tokens in self.prompts:
            _check("prompt", tokens, tokens <= limit, f"0 to {limit}, the model's positions")
        for depth in self.depths if self.steps else ():
            wanted = places(depth, max(self.steps, BREAKDOWN_STEPS if self.breakdown else 0))
            if wanted > limit:
                raise ValueOutOfRangeError(
                    f"bench: depth {depth} and {self.steps} steps need {wanted} positions; this "
                    f"model has {limit}; lower -d or -n"
                )
        return resolve_skips(self.skips, config.num_routed_layers)


def places(depth: int, steps: int) -> int:
    """Of a cache for a block of so many steps behind `depth` tokens, and for those that go before it."""
    return depth + max(steps, STEADY) + _SPARE


def resolve_skips(skips: Sequence[int] | str, num_routed: int) -> list[int]:
    """The numbers of skipped layers that `skips` of BenchOptions means for a model."""
    if skips == "all":
        return list(range(num_routed + 1))
    if isinstance(skips, str):
        return sorted({round(num_routed * quarter / 4) for quarter in range(5)})
    if wrong := [n for n in skips if not 0 <= n <= num_routed]:
        raise ValueOutOfRangeError(
            f"bench: cannot skip {wrong} layers; this model routes {num_routed}; wanted 0 to {num_routed}"
        )
    return list(skips)


def _check(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueOutOfRangeError(f"bench: {name} is {value!r}; wanted {wanted}")
