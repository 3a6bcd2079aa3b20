"""From a wanted number of skipped layers to thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ValueOutOfRangeError
from .points import FLEXIDEPTH, Point
from .windows import route_windows

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine

TOLERANCE = 0.02  # layers
_MAX_PASSES = 12
_FAR = 40.0  # logits: a gate or an offset beyond this is as good as 0 or 1


@dataclass(frozen=True)
class Dial:
    """thresholds of each routed layer; offset: of `turn_thresholds`, None where all are 0 or 1; skipped: layers
    that a calibration token skips with them in the mean."""

    thresholds: list[float]
    offset: float | None
    skipped: float


def turn_thresholds(thresholds: Sequence[float], offset: float) -> list[float]:
    """sigmoid(logit(tau) + offset) of each threshold: a higher offset skips more, in every layer."""
    stored = torch.tensor(list(thresholds), dtype=torch.float64)
    return torch.sigmoid(torch.logit(stored) + offset).tolist()


class ThresholdFinder:
    """Finds thresholds at which calibration tokens skip a number of layers in the mean.

    The recorded gates of a pass say where the offset would have to be if they stayed as they are; they do
    not, since later layers see what earlier ones skipped, so passes are repeated, within the bracket that they
    close in on.

    Args:
        windows: token ids of calibration texts.
    """

    def __init__(self, engine: Engine, windows: Sequence[Sequence[int]]) -> None:
        self.engine, self.windows = engine, windows
        self.stored = list(engine.config.router_thresholds)
        # Every search begins with the same pass.
        self._passes: dict[float, tuple[Tensor, float]] = {}

    def find(self, skipped: float) -> Dial:
        """The nearest that was found; where all gates are alike that need not be near.

        Raises:
            ValueOutOfRangeError: a number outside 0..routed layers, no text.
        """
        routed = self.engine.num_routed
        if not 0 <= skipped <= routed or not self.windows:
            raise ValueOutOfRangeError(
                f"eval: {skipped} layers to skip on {len(self.windows)} windows of calibration text; wanted 0 to "
                f"{routed} layers (as many are routed), and a window or more"
            )
        if skipped in (0, routed):
            return Dial([float(skipped > 0)] * routed, None, float(skipped))
        low, high, offset = -_FAR, _FAR, 0.0
        found: list[Dial] = []
        for _ in range(_MAX_PASSES):
            gates, count = self._pass(offset)
            found.append(Dial(turn_thresholds(self.stored, offset), offset, count))
            if abs(count - skipped) <= TOLERANCE:
                break
            low, high = (offset, high) if count < skipped else (low, offset)
            guess = _offset_of(gates, self.stored, skipped)
            offset = guess if low < guess < high else (low + high) / 2
        return min(found, key=lambda dial: abs(dial.skipped - skipped))

    def _pass(self, offset: float) -> tuple[Tensor, float]:
        """(gates, layers skipped in the mean) with thresholds turned by `offset`."""
        if offset in self._passes:
            return self._passes[offset]
        point = Point(FLEXIDEPTH, 0, thresholds=turn_thresholds(self.stored, offset))
        result = route_windows(self.engine, self.windows, point)
        if offset == 0:
            self._passes[offset] = result
        return result


def _offset_of(gates: Tensor, stored: Sequence[float], skipped: float) -> float:
    """The offset at which these gates [tokens, routed layers] would skip `skipped` layers a token."""
    margins = torch.logit(gates.double()) - torch.logit(torch.tensor(stored, dtype=torch.float64))
    margins = margins.nan_to_num(_FAR).clamp(-_FAR, _FAR).flatten()
    rank = min(max(round(skipped * len(gates)), 1), len(margins))
    return float(margins.kthvalue(rank).values)
