"""A routing report given as force_routing repeats the run that it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flexidepth import RoutingReport
from flexidepth.errors import ShapeError, ValueOutOfRangeError
from flexidepth.routing import resolve_force_routing

PROMPT = [72, 101, 108, 108, 111, 44, 32, 87]
LENGTH = {"max_new_tokens": 10, "eos_token_id": -1}
MASK = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 1]], dtype=torch.bool).repeat(6, 1)


@pytest.mark.parametrize(
    ("force", "mode"),
    [
        (None, "forced"),
        (MASK, "forced"),
        ("all", "forced_hard"),
        ("none", "forced_hard"),
        ([1, 3], "forced_hard"),
        (0.34, "forced_hard"),
        ("dense", "dense"),
    ],
    ids=str,
)
def test_a_report_replays_decisions_and_weights(llm, force, mode):
    settings = {**LENGTH, "logprobs": 3, "return_routing": True}
    out = llm.generate(PROMPT, force_routing=force, routing_seed=4, **settings)
    for report in (out.routing, RoutingReport.from_json(out.routing.to_json())):
        again = llm.generate(PROMPT, force_routing=report, **settings)
        assert (again.token_ids, again.logprobs) == (out.token_ids, out.logprobs)
        assert again.top_logprobs == out.top_logprobs
        assert torch.equal(again.routing.ran, out.routing.ran)
        assert again.routing.mode == mode
        score = llm.score(PROMPT, force_routing=report).logprobs
        assert torch.equal(score, llm.score(PROMPT, force_routing=force, routing_seed=4).logprobs)


def test_a_replay_in_another_mode_fills_a_cache_of_its_own(llm):
    """The same decisions with other weights give other keys and values."""
    report = llm.generate(PROMPT, **LENGTH, return_routing=True).routing
    hard = replace(report, mode="forced_hard")
    cache = llm.new_cache(64)
    llm.generate(PROMPT, cache=cache, force_routing=report, **LENGTH)
    out = llm.generate(PROMPT, cache=cache, force_routing=hard, **LENGTH)
    assert out.metrics.cached_tokens == 0
    out = llm.generate(PROMPT, cache=cache, force_routing=hard, **LENGTH)
    assert out.metrics.cached_tokens == len(PROMPT) - 1


def test_a_report_ends_where_the_run_ended(llm):
    report = llm.generate(PROMPT, **LENGTH, return_routing=True).routing
    longer = {**LENGTH, "max_new_tokens": 11}
    with pytest.raises(ShapeError, match="covers 17 tokens, position 17 is needed"):
        llm.generate(PROMPT, force_routing=report, **longer)


def test_a_report_behind_a_cache_says_where_it_begins(llm):
    cache = llm.new_cache(64)
    first = llm.generate(PROMPT, cache=cache, **LENGTH, return_routing=True).routing
    longer = [*PROMPT[:6], 33, 34, 35]
    whole = llm.generate(longer, **LENGTH, return_routing=True)
    behind = llm.generate(longer, cache=cache, **LENGTH, return_routing=True).routing
    assert (first.first_position, whole.routing.first_position) == (0, 0)
    assert behind.first_position == 6 and len(behind.ran) == len(whole.routing.ran) - 6
    again = RoutingReport.from_json(behind.to_json())
    assert again.first_position == 6
    for use in (again.mask, lambda: llm.generate(longer, force_routing=again, **LENGTH)):
        with pytest.raises(ValueOutOfRangeError, match=r"begins at position 6.*earlier.ran\[:6\]"):
            use()
    mask = torch.cat([first.ran[:6], behind.ran])
    assert torch.equal(mask, whole.routing.mask())
    assert llm.generate(longer, force_routing=mask, **LENGTH).token_ids == whole.token_ids


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"routing_layers": [0, 1, 2]},
            ShapeError,
            r"layers \[0, 1, 2\] of 4, this model \[1, 2, 3\]",
        ),
        ({"num_layers": 5}, ShapeError, r"of 5, this model \[1, 2, 3\] of 4"),
        ({"mode": "quick"}, ValueOutOfRangeError, "mode is 'quick'; wanted one of router, forced"),
        ({"ran": torch.full((17, 3), 2)}, ValueOutOfRangeError, "mask holds 2"),
    ],
)
def test_reports_that_do_not_fit_are_refused(llm, change, error, message):
    report = llm.generate(PROMPT, **LENGTH, return_routing=True).routing
    with pytest.raises(error, match=message):
        resolve_force_routing(replace(report, **change), llm.config)
