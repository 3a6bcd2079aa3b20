"""Timing of alternatives in turn, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

# Idle threads of other libraries (OpenMP) spin for up to 200 ms after their last work.
SETTLE_S = 0.25


@dataclass
class Case:
    """One alternative: `start` prepares a block, `step` is timed once per sample, `after` follows those, untimed.

    spins: its threads may still be busy when a step is over, so what comes next waits for them. foreign: others' code,
    whose failure ends the case and not the run; failed then says why, and samples are empty. note: to be said beside
    its figures.
    """

    name: str
    step: Callable[[], None]
    start: Callable[[], None] = lambda: None
    samples: list[float] = field(default_factory=list)
    after: Callable[[], None] = lambda: None
    spins: bool = True
    foreign: bool = False
    note: str = ""
    failed: str = ""
    blocks: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)


def rounds_noise(samples: Sequence[float], blocks: Sequence[int]) -> float:
    """Standard deviation of the blocks' medians, as a share of the median of all; NaN for fewer than two blocks."""
    medians, start = [], 0
    for count in blocks:
        medians.append(statistics.median(samples[start : start + count]))
        start += count
    if len(medians) < 2:
        return math.nan
    return statistics.stdev(medians) / statistics.median(samples)


@dataclass
class Spent:
    """Seconds of a measurement: in timed steps; between them, which is the harness; in all else (warm-up, filling of
    caches, pauses)."""

    timed: float = 0.0
    between: float = 0.0
    preparing: float = 0.0

    def add(self, other: Spent) -> None:
        """Count another measurement's too."""
        self.timed += other.timed
        self.between += other.between
        self.preparing += other.preparing

    @property
    def harness_share(self) -> float:
        """Of the time from the first timed step of a block to its last, what was not in a step."""
        return self.between / max(self.timed + self.between, 1e-12)


def alternate(
    cases: Sequence[Case],
    *,
    rounds: int,
    steps: int,
    steady: int = 0,
    warmup: int = 2,
    settle: float = SETTLE_S,
    progress: Callable[[str], None] | None = None,
) -> Spent:
    """Time `steps` steps of each case, spread over `rounds` turns through all cases.

    A block starts with `warmup` steps that are not counted, after a pause where the threads of the case
    before it may need one to go to sleep. Each turn begins with another case, so that a machine that drifts does not do
    so along the order of the cases.

    Args:
        steady: steps of a block after which it starts once more, and is timed: as many as the caches of the processor
            need to forget the case before.
    """
    spent = Spent()
    spinning = True  # what ran before all this is not known
    for number in range(rounds):
        block = (number + 1) * steps // rounds - number * steps // rounds
        first_case = number * len(cases) // rounds
        for case in (*cases[first_case:], *cases[:first_case]):
            if case.failed:
                continue
            if progress is not None:
                progress(f"round {number + 1}/{rounds}: {case.name}")
            begin = time.perf_counter()
            if spinning:
                time.sleep(settle)
            try:
                _prepare(case, steady, warmup)
                first = time.perf_counter()
                _time(case, block)
                last = time.perf_counter()
            except Exception as error:
                if not case.foreign:
                    raise
                case.failed = f"{type(error).__name__}: {error}"
                case.samples.clear()
                case.blocks.clear()
            else:
                inside = sum(case.samples[len(case.samples) - block :])
                spent.add(Spent(inside, last - first - inside, first - begin))
            spinning = case.spins
    return spent


def _prepare(case: Case, steady: int, warmup: int) -> None:
    case.start()
    if steady:
        for _ in range(steady):
            case.step()
        case.start()
    for _ in range(warmup):
        case.step()


def _time(case: Case, block: int) -> None:
    for _ in range(block):
        before = time.perf_counter()
        case.step()
        case.samples.append(time.perf_counter() - before)
        case.after()
    case.blocks.append(block)
