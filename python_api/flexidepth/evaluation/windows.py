"""Teacher-forced measures on windows of text: likelihood, first choices, layers skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..training.calibration_text import TokenSequence
from .forced_pass import Job, run_jobs
from .points import Point

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine


@dataclass(frozen=True)
class Trace:
    """What a point makes of windows.

    logprobs: float32 [predictions], of each token that counts but the first of each window. best: int64 [predictions],
    the likeliest token there. skipped: layers skipped by a token, mean over the tokens that count.
    """

    logprobs: Tensor
    best: Tensor
    skipped: float

    @property
    def perplexity(self) -> float:
        """exp(-mean log-probability)."""
        return math.exp(-float(self.logprobs.double().mean()))

    def agreement(self, other: Trace) -> float:
        """Share of the predictions at which both have the same first choice."""
        return float((self.best == other.best).double().mean())

    def difference(self, base: Trace) -> tuple[float, float]:
        """Mean of log p_base - log p over the predictions, nats a token, and its standard error.

        exp of the mean is the ratio of the perplexities. The error is that of independent tokens.
        """
        lost = (base.logprobs - self.logprobs).double()
        error = float(lost.std()) / math.sqrt(len(lost)) if len(lost) > 1 else math.nan
        return float(lost.mean()), error


def trace_windows(engine: Engine, windows: Sequence[TokenSequence], point: Point) -> Trace:
    """Run windows (each from an empty cache) through the engine as `point` routes."""
    routing, thresholds = point.resolve(engine.config)
    jobs = []
    for ids, counted in windows:
        asked = [(i, token) for i, token in enumerate(ids[1:]) if counted[i + 1]]
        job = Job(engine.new_cache(len(ids)), ids, asked, counted)
        run_jobs(engine, [job], routing, thresholds)
        job.cache.release()
        jobs.append(job)
    tokens = sum(sum(window.counted) for window in windows)
    return Trace(
        torch.cat([job.logprobs for job in jobs]),
        torch.cat([job.best for job in jobs]),
        engine.num_routed - sum(job.ran for job in jobs) / tokens,
    )
