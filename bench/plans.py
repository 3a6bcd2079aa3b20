"""Which layers the tokens of a case run: the independent variable of every benchmark here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexidepth.config import FlexiDepthConfig
from flexidepth.dial import calibrated_thresholds
from flexidepth.errors import CheckpointError, UnsupportedError, ValueOutOfRangeError
from flexidepth.routing import RoutingReport, skip_ratio_mask
from flexidepth_ext.forward_arguments import Routing

_SEED = 0


@dataclass(frozen=True)
class Plan:
    """One way to route.

    name: as in tables. asked: layers that a token is to skip; None where every layer runs and no router is evaluated.
    mode: of Engine.forward. mask: (sequence, first position, tokens) -> uint8 [tokens, routed layers], for the forced
    modes. thresholds: float32 [routed layers], None = the configuration's.
    """

    name: str
    asked: float | None
    mode: Routing
    mask: Callable[[int, int, int], Tensor] | None = None
    thresholds: Tensor | None = None

    def rows(self, sequences: int, position: int) -> Tensor | None:
        """Mask uint8 [sequences, routed layers] of a decoding step in which all are at one position."""
        if self.mask is None:
            return None
        return torch.cat([self.mask(s, position, 1) for s in range(sequences)])


def dense_plan() -> Plan:
    """The base model."""
    return Plan("dense", None, "dense")


def make_plans(routing: str, skips: list[int], config: FlexiDepthConfig) -> list[Plan]:
    """Plans of a routing of BenchOptions.

    Raises:
        UnsupportedError: the model's own routing where no calibration says which thresholds skip so many.
        ValueOutOfRangeError: a number of layers that the calibration does not reach; a report of other layers.
        CheckpointError: a file that is not a routing report.
    """
    if routing == "random":
        return [_random(n, config.num_routed_layers) for n in skips]
    if routing == "fixed":
        return [_fixed(n, config.num_routed_layers) for n in skips]
    if routing == "model":
        return [_own(n, config) for n in skips]
    return [_recorded(Path(routing), config)]


def _random(skipped: int, routed: int) -> Plan:
    def mask(sequence: int, position: int, tokens: int) -> Tensor:
        return skip_ratio_mask(skipped, _SEED + sequence, position, position + tokens, routed)

    return Plan(f"skip {skipped}", skipped, "forced_hard", mask)


def _fixed(skipped: int, routed: int) -> Plan:
    """Evenly spread over the routed layers, for every token the same."""
    row = torch.ones(1, routed, dtype=torch.uint8)
    row[0, [round((i + 0.5) * routed / skipped - 0.5) for i in range(skipped)]] = 0
    return Plan(
        f"skip {skipped} (fixed layers)",
        skipped,
        "forced_hard",
        lambda _, __, tokens: row.expand(tokens, -1).contiguous(),
    )


def _own(skipped: int, config: FlexiDepthConfig) -> Plan:
    if not config.calibration:
        raise UnsupportedError(
            "bench: routing 'model' needs a calibrated model; `flexidepth calibrate MODEL --data FILE` makes one of it"
        )
    thresholds = calibrated_thresholds(config.calibration, skipped)
    return Plan(f"routers, {skipped} asked", skipped, "router", thresholds=torch.tensor(thresholds))


def _recorded(path: Path, config: FlexiDepthConfig) -> Plan:
    """The decisions of a report, from its beginning again where it ends; sequences begin apart."""
    try:
        report = RoutingReport.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"bench: {path} is not a routing report: {error}") from error
    decisions = report.ran.to(torch.uint8)
    routed = config.num_routed_layers
    if not len(decisions) or decisions.shape[1] != routed:
        raise ValueOutOfRangeError(
            f"bench: {path} holds decisions {list(decisions.shape)}; wanted [tokens, {routed}] (routed layers)"
        )

    def mask(sequence: int, position: int, tokens: int) -> Tensor:
        # A golden section of the report apart, so that no two sequences of a batch run in step.
        start = position + int(sequence * 0.618 * len(decisions))
        return decisions[torch.arange(start, start + tokens) % len(decisions)].contiguous()

    skipped = routed - float(decisions.float().sum(1).mean())
    return Plan(f"recorded ({skipped:.1f} skipped)", skipped, "forced_hard", mask)
