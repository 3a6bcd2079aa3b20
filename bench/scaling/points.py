"""Measured points beside what the model predicts for them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """A measured time in ms. skipped: layers of a token, for prompts the share of the routed layers; None = dense.

    fixed: ms predicted from constants stated beforehand and the bandwidth measured in that run; None for prompts.
    fitted: ms predicted with the rate of the dense row of the same series; None for the dense row itself.
    spread: half of the samples lie within +- so much of the median; None where samples were not kept.
    """

    name: str
    skipped: float | None
    measured: float
    fixed: float | None
    fitted: float | None
    spread: float | None = None


@dataclass(frozen=True)
class Series:
    """What one machine measured in one run under one setting.

    kind: "decode" or "prompt". share: of the measured bandwidth that the dense row reached beside its latencies;
    None for prompts. rate: GFLOP/s of the dense prompt; None for decoding.
    """

    machine: str
    model: str
    dtype: str
    setting: str
    kind: str
    share: float | None
    rate: float | None
    points: list[Point] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, and the errors."""
        return {**asdict(self), "errors": {name: e.to_dict() for name, e in self.errors().items()}}

    def errors(self) -> dict[str, Errors]:
        """fixed: of times, the dense row's too. fixed_speedup: of speed-ups over the dense row, both predicted.
        fitted: of times, and so of speed-ups, with the dense row given. The first two for decoding only."""
        found: dict[str, Errors] = {}
        dense = self.dense
        routed = [p for p in self.points if p is not dense]
        if dense.fixed is not None:
            fixed = [p for p in self.points if p.fixed is not None]
            found["fixed"] = Errors.of((p.fixed, p.measured) for p in fixed)
            found["fixed_speedup"] = Errors.of(
                (dense.fixed / p.fixed, dense.measured / p.measured)
                for p in routed
                if p.fixed is not None
            )
        found["fitted"] = Errors.of((p.fitted, p.measured) for p in routed)
        return found

    @property
    def dense(self) -> Point:
        """The row that the others are compared with."""
        return next(p for p in self.points if p.skipped is None)


@dataclass(frozen=True)
class Errors:
    """Of predictions: predicted / measured - 1 of each point."""

    values: list[float]

    @classmethod
    def of(cls, pairs: Iterable[tuple[float | None, float]]) -> Errors:
        """From (predicted, measured)."""
        return cls([p / m - 1 for p, m in pairs if p is not None])

    @property
    def mean(self) -> float:
        """Mean of the errors' sizes; nan without points."""
        return statistics.fmean(map(abs, self.values)) if self.values else float("nan")

    @property
    def bias(self) -> float:
        """Mean with its sign: below 0 the model is too fast, for speed-ups too pessimistic."""
        return statistics.fmean(self.values) if self.values else float("nan")

    @property
    def largest(self) -> float:
        """Size of the largest; nan without points."""
        return max(map(abs, self.values), default=float("nan"))

    def to_dict(self) -> dict[str, float]:
        """Count, mean, bias and the largest."""
        return {
            "points": len(self.values),
            "mean": self.mean,
            "bias": self.bias,
            "max": self.largest,
        }


def pooled(series: Sequence[Series], kind: str) -> dict[str, Errors]:
    """The errors of all series of a kind together."""
    found: dict[str, list[float]] = {}
    for one in series:
        if one.kind == kind:
            for name, errors in one.errors().items():
                found.setdefault(name, []).extend(errors.values)
    return {name: Errors(values) for name, values in found.items()}
