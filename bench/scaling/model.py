"""Time of a decoding step and of a prompt.

step    seconds = bytes / (share x bandwidth) + phases x latency
prompt  seconds = FLOP / (share x arithmetic), or the bytes of all weights where these take longer
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import ValueOutOfRangeError

from ..ideal import flops_of_prompt
from .costs import Layers, dense_bytes, layers_of_token, step_bytes
from .devices import FLOP_SHARE, Device, Latency, Phases
from .precision import Precision


@dataclass(frozen=True)
class Machine:
    """What the time of a step depends on; bandwidth in GB/s."""

    bandwidth: float
    share: float
    phases: Phases
    latency: Latency

    @classmethod
    def of(cls, device: Device) -> Machine:
        """A device of the study."""
        return cls(device.bandwidth, device.share, device.phases, device.latency)

    def waiting(self, config: FlexiDepthConfig, layers: Layers | None) -> float:
        """Seconds of latency in a step; None = the plain dense model."""
        busy, idle = self.latency.phase_us, self.latency.idle_us
        phases, routed = self.phases, config.num_routed_layers
        plain = config.num_hidden_layers - routed
        if layers is None:
            return 1e-6 * busy * (phases.dense * (plain + routed) + phases.token)
        run, skip = layers.running, layers.skipping
        working = phases.dense * plain + phases.token + phases.always * routed
        working_or_idle = (
            phases.run * (run * busy + (routed - run) * idle),
            phases.skip * (skip * busy + (routed - skip) * idle),
        )
        return 1e-6 * (busy * working + sum(working_or_idle))

    def reading(self, read: float) -> float:
        """Seconds that reading so many bytes takes."""
        return read / (self.share * self.bandwidth * 1e9)

    def fitted(
        self,
        config: FlexiDepthConfig,
        precision: Precision,
        seconds: float,
        *,
        rows: int,
        context: int,
    ) -> Machine:
        """With the share of the bandwidth at which the dense model takes `seconds`.

        ValueOutOfRangeError where the latencies alone take longer.
        """
        reading = seconds - self.waiting(config, None)
        if reading <= 0:
            raise ValueOutOfRangeError(
                f"scaling: the dense model takes {seconds * 1e6:.0f} us, its phases alone would take "
                f"{self.waiting(config, None) * 1e6:.0f}; wanted a latency that leaves time to read"
            )
        read = dense_bytes(config, precision, rows=rows, context=context)
        return replace(self, share=read / reading / (self.bandwidth * 1e9))


def dense_seconds(
    machine: Machine,
    config: FlexiDepthConfig,
    precision: Precision,
    *,
    rows: int = 1,
    context: int = 0,
) -> float:
    """A step of the plain dense model."""
    read = dense_bytes(config, precision, rows=rows, context=context)
    return machine.reading(read) + machine.waiting(config, None)


def step_seconds(
    machine: Machine,
    config: FlexiDepthConfig,
    precision: Precision,
    layers: Layers,
    *,
    context: int = 0,
) -> float:
    """A step of the routed model."""
    read = step_bytes(config, precision, layers, context=context)
    return machine.reading(read) + machine.waiting(config, layers)


def token_seconds(
    machine: Machine,
    config: FlexiDepthConfig,
    precision: Precision,
    skipped: float,
    *,
    context: int = 0,
) -> float:
    """A token of one sequence that skips so many layers."""
    return step_seconds(
        machine, config, precision, layers_of_token(config, skipped), context=context
    )


def break_even(
    machine: Machine, config: FlexiDepthConfig, precision: Precision, *, context: int = 0
) -> float:
    """Layers that a token must skip to be as fast as the dense model; inf where skipping one saves nothing."""
    dense = dense_seconds(machine, config, precision, context=context)
    none, one = (
        token_seconds(machine, config, precision, number, context=context) for number in (0, 1)
    )
    return (none - dense) / (none - one) if none > one else float("inf")


def prompt_seconds(
    device: Device,
    config: FlexiDepthConfig,
    precision: Precision,
    tokens: int,
    skip_share: float | None,
) -> float:
    """A prompt into an empty cache; skip_share: of the routed layers that each token skips, None = the dense model.

    So many tokens need every weight.
    """
    flops = flops_of_prompt(config, tokens, skip_share or 0.0, routers=skip_share is not None)
    routed = config.num_routed_layers
    if skip_share is None:
        read = dense_bytes(config, precision)
    else:
        both = Layers(0, routed * (skip_share < 1), routed * (skip_share > 0), 0)
        read = step_bytes(config, precision, both)
    arithmetic = flops / (FLOP_SHARE * device.teraflops * 1e12)
    return max(arithmetic, Machine.of(device).reading(read))
