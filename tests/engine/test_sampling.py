"""engine.sample against transformers' own filters."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexidepth.errors import DtypeError, ValueOutOfRangeError

from .conftest import tiny_config, tiny_model

DRAWS = 4000


@pytest.fixture
def engine(make_engine):
    return make_engine(tiny_model(tiny_config()))


def sample(
    engine, logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None
):
    n = len(logits)
    return engine.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=torch.arange(n) if seeds is None else seeds,
        positions=torch.zeros(n, dtype=torch.int64) if positions is None else positions,
    )


def filtered(logits, temperature, top_k, top_p, min_p):
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1, 0), (5, 1, 0), (0, 0.7, 0), (0, 1, 0.2), (12, 0.8, 0.05), (1, 1, 0)],
)
def test_distribution(engine, temperature, top_k, top_p, min_p):
    logits = torch.randn(1, 60) * 2
    want = filtered(logits, temperature, top_k, top_p, min_p)[0]
    tokens, _ = sample(
        engine,
        logits.expand(DRAWS, -1).contiguous(),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    counts = torch.bincount(tokens.long(), minlength=60) / DRAWS
    assert (counts[want == 0] == 0).all()
    # Total variation of a multinomial sample of this size: about sqrt(k / (2 pi n)), far below 0.08.
    assert (counts - want).abs().sum() / 2 < 0.08


def test_nucleus_over_a_large_vocabulary(engine):
    logits = torch.randn(1, 49152) * 0.5  # flat: the nucleus holds tens of thousands of tokens
    want = filtered(logits, 1.0, 0, 0.9, 0.0)[0] > 0
    tokens, _ = sample(engine, logits.expand(200, -1).contiguous(), top_p=0.9)
    assert want[tokens.long()].all()


def test_greedy_takes_the_first_of_the_largest(engine):
    logits = torch.zeros(2, 100)
    logits[0, 40] = logits[0, 70] = 3.0
    tokens, logprobs = sample(engine, logits, temperature=0.0)
    assert tokens.tolist() == [40, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [40, 0]])


def test_logprobs_are_of_the_logits_as_given(engine):
    logits = torch.randn(50, 300) * 3
    tokens, logprobs = sample(engine, logits, temperature=0.7, top_k=20)
    torch.testing.assert_close(
        logprobs, logits.log_softmax(-1).gather(1, tokens.long()[:, None])[:, 0]
    )


def test_a_draw_depends_on_seed_and_position_alone(engine):
    logits = torch.randn(1, 500).expand(8, -1).contiguous()
    seeds, positions = (
        torch.tensor([1, 1, 2, 2, 1, 1, -5, 2**62]),
        torch.tensor([0, 1, 0, 1, 0, 1, 0, 0]),
    )
    together, _ = sample(engine, logits, seeds=seeds, positions=positions)
    for i in range(8):
        alone, _ = sample(
            engine, logits[:1], seeds=seeds[i : i + 1], positions=positions[i : i + 1]
        )
        assert alone[0] == together[i]
    assert together[0] == together[4] and together[1] == together[5]
    assert len(set(together.tolist())) > 3


def test_excluded_tokens_and_bad_logits(engine):
    logits = torch.full((1, 10), float("-inf"))
    logits[0, 7] = 0.0
    assert sample(engine, logits, temperature=5.0)[0].item() == 7
    with pytest.raises(ValueOutOfRangeError, match="at least one token"):
        sample(engine, torch.full((1, 10), float("-inf")))
    logits[0, 3] = float("nan")
    with pytest.raises(ValueOutOfRangeError, match="row 0 of the logits contains NaN"):
        sample(engine, logits)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"top_k": -1}]
)
def test_bad_parameters(engine, bad):
    with pytest.raises(ValueOutOfRangeError, match=r"temperature is|wanted top_k >= 0"):
        sample(engine, torch.zeros(1, 10), **bad)


def test_seed_types(engine):
    with pytest.raises(DtypeError, match="seeds has dtype"):
        sample(engine, torch.zeros(1, 10), seeds=torch.zeros(1, dtype=torch.int32))
