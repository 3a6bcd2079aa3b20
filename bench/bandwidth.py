"""Read bandwidth of this machine's memory: what a decode step is up against."""

from __future__ import annotations

import mmap
import time

import torch

_BYTES = 512 << 20  # far beyond any cache
_ROUNDS = 5


def read_bandwidth(threads: int) -> float:
    """Best of five sums over 512 MB of float32 with torch on `threads` threads, in GB/s."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.frombuffer(huge_pages(_BYTES), dtype=torch.float32).fill_(1.0)
        best = float("inf")
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            data.sum()
            best = min(best, time.perf_counter() - begin)
        return _BYTES / best / 1e9
    finally:
        torch.set_num_threads(before)


def huge_pages(nbytes: int) -> mmap.mmap:
    """Memory on huge pages where the system gives them, as the engine's weights are: on scattered small ones two thirds
    of the bandwidth were measured."""
    memory = mmap.mmap(-1, nbytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
