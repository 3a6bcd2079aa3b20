"""Read bandwidth of this machine's memory: what a decode step is up against."""

from __future__ import annotations

import time

import torch

_BYTES = 512 << 20  # far beyond any cache
_ROUNDS = 5


def read_bandwidth(threads: int) -> float:
    """Best of five sums over 512 MB of float32 with torch on `threads` threads, in GB/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(_BYTES // 4)
        best = float("inf")
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            data.sum()
            best = min(best, time.perf_counter() - begin)
        return _BYTES / best / 1e9
    finally:
        torch.set_num_threads(before)
