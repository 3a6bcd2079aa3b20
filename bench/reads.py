"""What memory gives a step that only reads: the limit of decoding on processors with large caches.

A part of what is read over and over stays in the last-level cache, the larger the fewer bytes there are. So a step with
half the bytes takes less than half the time, and only a read of as many bytes, in the same turns, shows how much less.
"""

from __future__ import annotations

import math

import torch

from flexidepth.config import FlexiDepthConfig

from .bandwidth import huge_pages
from .ideal import bytes_per_token
from .timing import Case

_MOST = 1 << 30  # beyond it caches make no difference
_SETTLED = 8e9  # bytes, after which a cache has forgotten what was read before; 30 passes of 270 MB were measured
STEADY = 30  # steps at most


class ReadCase(Case):
    """A step is torch's sum over so many bytes of float32 on `threads` threads."""

    def __init__(self, nbytes: float, threads: int) -> None:
        super().__init__(f"read {nbytes / 1e6:.0f} MB", self._read, self._begin)
        self.nbytes, self.threads = nbytes, threads
        held = max(4, int(min(nbytes, _MOST)) // 4 * 4)
        self.data = torch.frombuffer(huge_pages(held), dtype=torch.float32).fill_(1.0)

    def _begin(self) -> None:
        torch.set_num_threads(self.threads)

    def _read(self) -> None:
        self.data.sum()

    @property
    def read_ms(self) -> float:
        """Median time of all of the bytes."""
        return self.median * 1e3 * self.nbytes / self.data.nbytes


class Reads:
    """Reads of the most and of the fewest bytes that a step of a model can have.

    config: of the model, at batch 1 with `context` tokens in the cache. weight_bytes: of a weight.
    """

    def __init__(
        self, config: FlexiDepthConfig, weight_bytes: int, context: int, threads: int
    ) -> None:
        ends = {
            bytes_per_token(config, skipped, weight_bytes=weight_bytes, context=context)
            for skipped in (0, config.num_routed_layers)
        }
        self.cases = [ReadCase(nbytes, threads) for nbytes in sorted(ends)]

    def milliseconds(self, nbytes: float) -> float:
        """In which so many bytes are read: on the line through the two that were measured."""
        few, most = self.cases[0], self.cases[-1]
        if few is most:
            return few.read_ms * nbytes / few.nbytes
        slope = (most.read_ms - few.read_ms) / (most.nbytes - few.nbytes)
        return few.read_ms + slope * (nbytes - few.nbytes)


def steady_steps(nbytes: float) -> int:
    """Steps of so many bytes after which the caches hold what such steps leave in them."""
    return min(STEADY, math.ceil(_SETTLED / nbytes))
