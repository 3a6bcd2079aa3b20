"""Timing on a device: graphs of many runs in turn over copies that no cache can hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .cases import OpCase

_BEYOND_CACHE = 256e6  # bytes of all copies together: more than any L2 cache holds
_MOST_COPIES = 2048
_RUNS_PER_GRAPH = 32
_SAMPLES = 15


# Given functions that queue one run each: seconds a run, several samples.
Measure = Callable[[Sequence[Callable[[], object]]], list[float]]


@dataclass(frozen=True)
class OpRow:
    """What an op took, microseconds a run: median, and the spread of the samples."""

    op: str
    what: str
    rows: int
    microseconds: float
    deviation: float
    megabytes: float
    gigabytes_per_second: float
    share: float
    target: str
    met: bool | None
    teraflops: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def copies_of(case: OpCase) -> int:
    """How many copies of its weights it takes that each run finds nothing of its own in a cache."""
    return max(1, min(_MOST_COPIES, round(_BEYOND_CACHE / case.nbytes)))


def time_case(case: OpCase, bandwidth: float, measure: Measure) -> OpRow:
    """Time one op; bandwidth is the bytes a second that a copy reaches."""
    samples = measure([case.make() for _ in range(copies_of(case))])
    median = statistics.median(samples)
    met = None
    if case.target is not None:
        met = median * 1e6 <= case.target.most_microseconds(case.nbytes, bandwidth)
    return OpRow(
        case.op,
        case.what,
        case.rows,
        median * 1e6,
        statistics.pstdev(samples) * 1e6,
        case.nbytes / 1e6,
        case.nbytes / median / 1e9,
        case.nbytes / median / bandwidth,
        "" if case.target is None else str(case.target),
        met,
        case.flops / median / 1e12 if case.flops else None,
    )


def measure_in_graphs(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds a run, one sample a replay of a CUDA graph that runs them in turn."""
    count = max(len(runs), _RUNS_PER_GRAPH)
    count -= count % len(runs)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            runs[i % len(runs)]()
    begin, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(2)
    )
    samples = []
    for number in range(_SAMPLES + 2):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:  # the first ones warm up
            samples.append(begin.elapsed_time(end) / 1e3 / count)
    return samples


def copy_bandwidth(megabytes: int = 1024) -> float:
    """Bytes a second that a copy within the device's memory reads and writes."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = min(measure_in_graphs([lambda: target.copy_(source)]))
    return 2 * source.numel() / best
