"""Two results side by side: which rows got slower by more than either run's own noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .report import Columns
from .results_file import LoadedResult
from .rows import BenchRow

LEAST = 0.03  # what two runs of the same row may differ by in any case
_DEVIATIONS = 3.0


@dataclass(frozen=True)
class Change:
    """A row of both results.

    before, after: milliseconds, or, on different machines, the inverse of the speed over the dense pass. change:
    after / before - 1. memory: the same of a mere read of as many bytes in either run, by the part of a read's rate at
    which the row has its bytes, 0 where that is not known. allowed: what noise explains: 3 standard deviations of a
    run's median, both runs together, at least 3 %.
    """

    test: str
    name: str
    before: float
    after: float
    change: float
    memory: float
    allowed: float

    @property
    def own(self) -> float:
        """What is left of the change if the memory's is taken off."""
        return (1 + self.change) / (1 + self.memory) - 1

    @property
    def slower(self) -> bool:
        """By more than noise."""
        return self.own > self.allowed

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.slower:
            return "SLOWER"
        return "faster" if self.own < -self.allowed else ""


CHANGE_COLUMNS: Columns = (
    ("test", "test", ""),
    ("name", "row", ""),
    ("before", "before", ".3f"),
    ("after", "after", ".3f"),
    ("change", "change", "+.1%"),
    ("memory", "memory's", "+.1%"),
    ("own", "own", "+.1%"),
    ("allowed", "noise", ".1%"),
    ("verdict", "", ""),
)


@dataclass(frozen=True)
class Comparison:
    """changes: of rows that both have. missing: rows of the first result that the second lacks. ratios: whether the
    machines differ, so that speeds over the dense pass were compared instead of times."""

    changes: list[Change]
    missing: list[str]
    ratios: bool

    @property
    def slower(self) -> list[Change]:
        """What got slower by more than noise."""
        return [change for change in self.changes if change.slower]


def compare(before: LoadedResult, after: LoadedResult) -> Comparison:
    """Our own rows of `before` against those of `after`."""
    ratios = any(
        before.machine.get(key, "") != after.machine.get(key, "") for key in ("cpu", "cores", "gpu")
    )
    new = {row.key: row for row in after.rows}
    changes, missing = [], []
    for row in before.rows:
        if row.peer or _value(row, ratios) is None:
            continue
        other = new.get(row.key)
        if other is None or _value(other, ratios) is None:
            missing.append(f"{_test(row)}: {row.name}")
            continue
        a, b = _value(row, ratios) or 0.0, _value(other, ratios) or 0.0
        memory, part = 0.0, 0.0
        if not ratios and row.given is not None and other.given is not None:
            # Of a row that computes more than it reads, memory is a part.
            part = min(1.0, row.work_share or 0.0)
            memory = part * (row.given / other.given - 1)
        allowed = _allowed((row, other), part)
        changes.append(Change(_test(row), row.name, a, b, b / a - 1, memory, allowed))
    return Comparison(changes, missing, ratios)


def _value(row: BenchRow, ratios: bool) -> float | None:
    if ratios:
        return None if row.speedup is None else 1 / row.speedup
    return row.ms_median


def _allowed(rows: Sequence[BenchRow], part: float) -> float:
    """Noise of the two medians, and of the reads that are taken off by `part`, all independent of each other; a median
    of r rounds varies by 1/sqrt(r) of a round's."""
    variance = 0.0
    for row in rows:
        for noise in (row.noise, part * (row.given_noise or 0.0)):
            if math.isfinite(noise):
                variance += noise**2 / max(1, len(row.blocks))
    return max(LEAST, _DEVIATIONS * math.sqrt(variance))


def _test(row: BenchRow) -> str:
    parts = [row.model, row.dtype, row.device]
    parts += [f"{row.threads}t"] if row.threads is not None else []
    parts += [f"x{row.batch}"] if row.batch > 1 else []
    return " ".join([*parts, row.test])
