"""Multiple choice by the likelihood of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..routing import ForcedRouting
from .forced_pass import Job, run_jobs
from .points import Point
from .questions import EncodedQuestion

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine


@dataclass(frozen=True)
class ChoiceScore:
    """Outcome of a task.

    acc: share of questions whose likeliest choice is right. acc_norm: the same with log-likelihoods divided by
    the choices' characters, as in lm-eval. Each with its standard error. skipped: layers skipped by a token,
    mean over every token that was computed (a question's context once).
    """

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    skipped: float


def score_questions(
    engine: Engine, questions: Sequence[EncodedQuestion], point: Point
) -> ChoiceScore:
    """Answer questions as `point` routes. A context is computed once and shared by its choices."""
    routing, thresholds = point.resolve(engine.config)
    right = right_norm = tokens = ran = 0
    for group in _groups(questions, engine.max_rows):
        results, jobs = choice_logprobs(engine, group, routing, thresholds)
        for question, values in zip(group, results, strict=True):
            pairs = list(zip(values, question.lengths, strict=True))
            normed = [value / length for value, length in pairs]
            right += values.index(max(values)) == question.gold
            right_norm += normed.index(max(normed)) == question.gold
        tokens += sum(len(job.ids) for job in jobs)
        ran += sum(job.ran for job in jobs)
    count = len(questions)
    acc, acc_norm = right / count, right_norm / count
    return ChoiceScore(
        count,
        acc,
        standard_error(acc, count),
        acc_norm,
        standard_error(acc_norm, count),
        engine.num_routed - ran / tokens,
    )


def choice_logprobs(
    engine: Engine,
    questions: Sequence[EncodedQuestion],
    routing: ForcedRouting,
    thresholds: Tensor | None,
) -> tuple[list[list[float]], list[Job]]:
    """(log-likelihood of each choice of each question, the jobs that were run)."""
    contexts = []
    for question in questions:
        longest = max(map(len, question.choices))
        cache = engine.new_cache(len(question.context) + longest)
        end = len(question.context) - 1
        # The context's end predicts the first token of every choice.
        contexts.append(Job(cache, question.context, [(end, c[0]) for c in question.choices]))
    run_jobs(engine, contexts, routing, thresholds)
    jobs: list[Job] = []
    behind: list[list[Job | None]] = []
    for question, context in zip(questions, contexts, strict=True):
        own: list[Job | None] = []
        for choice in question.choices:
            job = None
            if len(choice) > 1:
                cache = engine.new_cache(len(question.context) + len(choice) - 1)
                cache.copy_from(context.cache)
                job = Job(cache, choice[:-1], list(enumerate(choice[1:])))
                jobs.append(job)
            own.append(job)
        behind.append(own)
    run_jobs(engine, jobs, routing, thresholds)
    results = [
        [
            float(first + (0 if job is None else job.logprobs.double().sum()))
            for first, job in zip(context.logprobs.double(), own, strict=True)
        ]
        for context, own in zip(contexts, behind, strict=True)
    ]
    for done in (*contexts, *jobs):
        done.cache.release()
    return results, [*contexts, *jobs]


def standard_error(share: float, count: int) -> float:
    """Of a share of `count` yes-or-no outcomes, from their sample variance as in lm-eval; NaN for one."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan


def _groups(questions: Sequence[EncodedQuestion], rows: int) -> Iterator[list[EncodedQuestion]]:
    """Questions whose contexts fill about two engine calls: enough to fill them, few caches at a time."""
    group: list[EncodedQuestion] = []
    for question in questions:
        group.append(question)
        if sum(len(q.context) for q in group) >= 2 * rows:
            yield group
            group = []
    if group:
        yield group
