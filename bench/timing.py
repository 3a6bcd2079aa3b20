"""Timing of alternatives in turn, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Idle threads of other libraries (OpenMP) spin for up to 200 ms after their last work.
SETTLE_S = 0.25


@dataclass
class Case:
    """One alternative: `start` prepares a block, `step` is timed once per sample."""

    name: str
    step: Callable[[], None]
    start: Callable[[], None] = lambda: None
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def mean(self) -> float:
        """Seconds."""
        return statistics.fmean(self.samples)

    @property
    def deviation(self) -> float:
        """Standard deviation, seconds."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0

    @property
    def p99(self) -> float:
        """Seconds."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def alternate(
    cases: Sequence[Case],
    *,
    rounds: int,
    steps: int,
    warmup: int = 2,
    settle: float = SETTLE_S,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Time `steps` steps of each case, spread over `rounds` turns through all cases.

    A block starts with `warmup` steps that are not counted, after a pause that lets the threads of the case
    before it go to sleep.
    """
    for number in range(rounds):
        block = (number + 1) * steps // rounds - number * steps // rounds
        for case in cases:
            if progress is not None:
                progress(f"round {number + 1}/{rounds}: {case.name}")
            case.start()
            time.sleep(settle)
            for _ in range(warmup):
                case.step()
            for _ in range(block):
                begin = time.perf_counter()
                case.step()
                case.samples.append(time.perf_counter() - begin)


def load_average() -> float:
    """One-minute load of the machine; nan where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return float("nan")
