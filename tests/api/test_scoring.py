"""score() and loglikelihood(): the reference's log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from flexidepth.errors import UnsupportedError, ValueOutOfRangeError

from .conftest import BOS, EOS
from .tokenizers import byte_tokenizer


@torch.no_grad()
def test_score_equals_the_reference(llm, model):
    ids = torch.randint(0, 256, (90,)).tolist()
    table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    score = llm.score(ids)
    torch.testing.assert_close(score.logprobs, want, rtol=1e-4, atol=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-want.mean()), rel=1e-4)
    assert torch.equal(score.greedy, table[:-1].argmax(-1) == torch.tensor(ids[1:]))
    assert 1 < score.mean_layers_used < 4
    both = llm.score([ids, ids[:20]], force_routing="all")
    assert both[0].mean_layers_used == 4 and len(both[1].logprobs) == 19
    with pytest.raises(ValueOutOfRangeError, match="1 tokens; wanted 2"):
        llm.score([7])


def test_loglikelihood(llm):
    whole = llm.score("the cat sat")
    value, greedy = llm.loglikelihood("the cat", " sat")
    assert value == pytest.approx(float(whole.logprobs[-4:].sum()), rel=1e-5) and isinstance(
        greedy, bool
    )


def test_an_empty_context_is_the_beginning_of_a_text(llm):
    text = list(llm.tokenizer.encode("the cat"))
    value, greedy = llm.loglikelihood("", "the cat")
    score = llm.score([BOS, *text])
    assert value == pytest.approx(float(score.logprobs.sum())) and not greedy
    llm.tokenizer.bos_token = None
    want = float(llm.score([EOS, *text]).logprobs.sum())
    assert llm.loglikelihood("", "the cat")[0] == pytest.approx(want) != value
    llm.tokenizer.eos_token = None
    with pytest.raises(UnsupportedError, match="neither BOS nor EOS"):
        llm.loglikelihood("", "the cat")


def test_an_empty_continuation_is_refused(llm):
    with pytest.raises(ValueOutOfRangeError, match="the continuation is '', no token"):
        llm.loglikelihood("the cat", "")


def test_bos_is_not_added_to_a_continuation(llm):
    value, _ = llm.loglikelihood("the cat", " sat")
    context = [BOS, *llm.tokenizer.encode("the cat")]
    llm.tokenizer = byte_tokenizer(adds_bos=True)
    tail = llm.tokenizer.encode(" sat")[1:]
    want = float(llm.score([*context, *tail]).logprobs[-len(tail) :].sum())
    assert llm.loglikelihood("the cat", " sat")[0] == pytest.approx(want) != value


def test_score_follows_the_thresholds(llm):
    ids = torch.randint(0, 256, (20,)).tolist()
    assert llm.score(ids, skip_threshold=0.0).mean_layers_used == 4
    assert llm.score(ids, skip_threshold=1.0).mean_layers_used == 1
    low, high = ([0.0, 0.0, 1.0], [1.0, 1.0, 0.0])
    assert llm.score(ids, skip_threshold=low).mean_layers_used == 3
    assert llm.score(ids, skip_threshold=high).mean_layers_used == 2
    one, _ = llm.loglikelihood("ab", "cd", skip_threshold=0.0)
    assert one != llm.loglikelihood("ab", "cd", skip_threshold=1.0)[0]


@torch.no_grad()
def test_a_mask_goes_by_absolute_position_through_all_chunks(llm, model):
    ids = torch.randint(0, 256, (90,)).tolist()  # the engine takes 32 rows at once
    mask = torch.rand(90, 3) < 0.5
    score = llm.score(ids, force_routing=mask)
    assert score.mean_layers_used == pytest.approx(1 + mask.sum().item() / 90)
    table = model(torch.tensor([ids]), force_routing=mask).logits[0].log_softmax(-1)
    want = table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(score.logprobs, want, rtol=1e-4, atol=1e-4)
