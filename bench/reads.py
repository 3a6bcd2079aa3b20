"""What memory gives a step that only reads: the limit of decoding on processors with large caches.

A part of what is read over and over stays in the last-level cache, the larger the fewer bytes there are. So a step with
half the bytes takes less than half the time, and only a read of as many bytes, in the same turns, shows how much less.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flexidepth.config import FlexiDepthConfig

from .bandwidth import huge_pages
from .ideal import bytes_per_token
from .timing import Case, rounds_noise

_MOST = 1 << 30  # beyond it caches make no difference
_SETTLED = 8e9  # bytes, after which a cache has forgotten what was read before; 30 passes of 270 MB were measured
STEADY = 30  # steps at most


class ReadCase(Case):
    """A step is torch's sum over so many bytes of float32 on `threads` threads."""

    def __init__(self, nbytes: float, threads: int) -> None:
        super().__init__(f"read {nbytes / 1e6:.0f} MB", self._read, self._begin)
        self.nbytes, self.threads = nbytes, threads
        self.held = max(4, int(min(nbytes, _MOST)) // 4 * 4)
        self.data = torch.frombuffer(huge_pages(self.held), dtype=torch.float32).fill_(1.0)

    def _begin(self) -> None:
        torch.set_num_threads(self.threads)

    def _read(self) -> None:
        self.data.sum()

    @property
    def read_ms(self) -> float:
        """Median time of all of the bytes."""
        return self.median * 1e3 * self.nbytes / self.held

    def to_dict(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        return {"nbytes": self.held, "samples": self.samples, "blocks": self.blocks}


class Reads:
    """Reads of the most and of the fewest bytes that a step of a model can have, of the latter alone where both are so
    many that caches make no difference.

    config: of the model, at batch 1 with `context` tokens in the cache. weight_bytes: of a weight.
    """

    def __init__(
        self, config: FlexiDepthConfig, weight_bytes: int, context: int, threads: int
    ) -> None:
        ends = {
            bytes_per_token(config, skipped, weight_bytes=weight_bytes, context=context)
            for skipped in (0, config.num_routed_layers)
        }
        self._threads = torch.get_num_threads()
        few = [nbytes for nbytes in sorted(ends) if nbytes < _MOST]
        self.cases = [ReadCase(nbytes, threads) for nbytes in few or [min(ends)]]

    def milliseconds(self, nbytes: float) -> float:
        """In which so many bytes are read: on the line through the two that were measured, outside of it at the rate of
        the nearer one."""
        few, most = self.cases[0], self.cases[-1]
        if not few.nbytes < nbytes < most.nbytes:
            nearer = few if nbytes <= few.nbytes else most
            return nearer.read_ms * nbytes / nearer.nbytes
        slope = (most.read_ms - few.read_ms) / (most.nbytes - few.nbytes)
        return few.read_ms + slope * (nbytes - few.nbytes)

    @property
    def noise(self) -> float:
        """As BenchRow.noise, of the less steady one."""
        return max(rounds_noise(case.samples, case.blocks) for case in self.cases)

    def close(self) -> None:
        """Give the memory back, and torch its threads."""
        torch.set_num_threads(self._threads)
        for case in self.cases:
            case.data = torch.empty(0)


def steady_steps(nbytes: float) -> int:
    """Steps of so many bytes after which the caches hold what such steps leave in them."""
    return min(STEADY, math.ceil(_SETTLED / nbytes))
