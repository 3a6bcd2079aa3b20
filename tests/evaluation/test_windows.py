"""The teacher-forced pass: what score() gives, whatever the company of a sequence in a call."""

from __future__ import annotations

import math

import pytest
import torch

from flexidepth import FlexiDepth
from flexidepth.evaluation.forced_pass import Job, run_jobs
from flexidepth.evaluation.points import Point, base_point
from flexidepth.evaluation.windows import Trace, trace_windows
from flexidepth.training.calibration_text import TokenSequence

from .conftest import all_counted


@pytest.mark.parametrize(
    "point",
    [
        base_point(),
        Point("flexidepth", 1),
        Point("flexidepth", 1, thresholds=[0.4, 0.6, 0.5]),
        Point("random", 1, force=1 / 3),
    ],
)
def test_a_trace_is_what_score_gives(
    llm: FlexiDepth, windows: list[list[int]], point: Point
) -> None:
    trace = trace_windows(llm.engine, all_counted(windows), point)
    scores = llm.score(windows, force_routing=point.force, skip_threshold=point.thresholds)
    want = torch.cat([score.logprobs for score in scores])
    torch.testing.assert_close(trace.logprobs, want, rtol=1e-4, atol=1e-4)
    tokens = torch.tensor([token for window in windows for token in window[1:]])
    greedy = torch.cat([score.greedy for score in scores])
    assert torch.equal(trace.best == tokens, greedy)
    used = sum(s.mean_layers_used * len(w) for s, w in zip(scores, windows, strict=True)) / 440
    assert trace.skipped == pytest.approx(4 - used)
    assert trace.perplexity == pytest.approx(math.exp(-want.mean()), rel=1e-4)


def test_only_what_counts_is_traced(llm: FlexiDepth, windows: list[list[int]]) -> None:
    """Every third token and the last 50 of each window, cut across engine calls."""
    point = Point("flexidepth", 1, thresholds=[0.4, 0.6, 0.5])
    every = trace_windows(llm.engine, all_counted(windows), point)
    counted = [[i % 3 == 0 or len(w) - i <= 50 for i in range(len(w))] for w in windows]
    some = trace_windows(llm.engine, list(map(TokenSequence, windows, counted)), point)
    kept = torch.tensor([flag for flags in counted for flag in flags[1:]])
    assert torch.equal(some.logprobs, every.logprobs[kept])
    assert torch.equal(some.best, every.best[kept])
    begun = [[i < 30 for i in range(len(w))] for w in windows]
    first = trace_windows(llm.engine, list(map(TokenSequence, windows, begun)), point)
    cut = trace_windows(llm.engine, all_counted([window[:30] for window in windows]), point)
    assert first.skipped == cut.skipped != every.skipped


def test_jobs_do_not_see_each_other(llm: FlexiDepth, windows: list[list[int]]) -> None:
    """300 + 100 + 40 tokens in calls of 256 rows: cut within windows, several of them in a call."""
    point = Point("random", 1, force=1 / 3)
    routing, thresholds = point.resolve(llm.config)

    def jobs() -> list[Job]:
        return [Job(llm.engine.new_cache(len(w)), w, list(enumerate(w[1:]))) for w in windows]

    together, alone = jobs(), jobs()
    run_jobs(llm.engine, together, routing, thresholds)
    for job in alone:
        run_jobs(llm.engine, [job], routing, thresholds)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.best, other.best)
        assert one.ran == other.ran == 2 * len(one.ids)


def test_only_what_is_asked_is_answered(llm: FlexiDepth, windows: list[list[int]]) -> None:
    window = windows[1]
    routing, _ = base_point().resolve(llm.config)
    all_of_it = Job(llm.engine.new_cache(100), window, list(enumerate(window[1:])))
    some = Job(llm.engine.new_cache(100), window, [(4, window[5]), (4, 7), (98, window[99])])
    run_jobs(llm.engine, [all_of_it, some], routing, None)
    assert len(some.logprobs) == 3 and some.best[0] == some.best[1] == all_of_it.best[4]
    assert some.logprobs[0] == all_of_it.logprobs[4] and some.logprobs[2] == all_of_it.logprobs[98]
    assert some.logprobs[1] != some.logprobs[0]


def test_comparison_of_traces() -> None:
    base = Trace(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([1, 2, 3]), 0)
    other = Trace(torch.tensor([-1.5, -2.0, -4.0]), torch.tensor([1, 5, 3]), 2)
    nats, error = other.difference(base)
    assert nats == pytest.approx(0.5) and error == pytest.approx(0.5 / math.sqrt(3))
    assert math.exp(nats) == pytest.approx(other.perplexity / base.perplexity)
    assert other.agreement(base) == pytest.approx(2 / 3)
    assert base.difference(base) == (0, 0)
