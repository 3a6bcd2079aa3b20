"""Caches, padding, positions and generation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from flexidepth.errors import ShapeError

from ..engine.conftest import tiny_config, tiny_model

GREEDY = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
# What a different order of the same sums may leave in float32 after four layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module", params=[None, 9], ids=["full", "window"])
def model(request):
    return tiny_model(tiny_config(sliding_window=request.param))


def caches(model):
    return (
        DynamicCache(),
        StaticCache(config=model.config, max_cache_len=64),
    )


@pytest.mark.parametrize("kind", [0, 1], ids=["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * 40, [40], [7, 1, 1, 20, 11]])
@torch.no_grad()
def test_cached_steps_equal_one_forward(model, ids, kind, chunks):
    full, cache = model(ids), caches(model)[kind]
    parts = [model(part, past_key_values=cache) for part in ids.split(chunks, dim=1)]
    assert int(cache.get_seq_length()) == 40
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), full.logits, **CLOSE)
    torch.testing.assert_close(torch.cat([p.gates for p in parts], 1), full.gates, **CLOSE)
    assert torch.equal(torch.cat([p.run for p in parts], 1), full.run)


@torch.no_grad()
def test_the_cache_has_no_holes(model, ids):
    """Keys and values of skipped tokens are those that running ones would have."""
    held = {}
    for force in ("none", [2, 3]):
        cache = model(ids, force_routing=force).past_key_values
        held[str(force)] = cache.layers[1].keys, cache.layers[1].values
    for keys, others in zip(*held.values(), strict=True):
        assert keys.shape[2] == 40 and torch.equal(keys, others)
        assert (keys.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(model, ids, side):
    full = model(ids)
    pad, ones = torch.full((2, 7), 5), torch.ones(2, 40, dtype=torch.long)
    order = (pad, ids) if side == "left" else (ids, pad)
    masks = (pad * 0, ones) if side == "left" else (ones, pad * 0)
    real = slice(7, None) if side == "left" else slice(0, 40)
    out = model(torch.cat(order, 1), attention_mask=torch.cat(masks, 1))
    assert out.logits.isfinite().all()
    torch.testing.assert_close(out.logits[:, real], full.logits, **CLOSE)
    assert torch.equal(out.run[:, real], full.run)
    # A draw goes by position, so positions are those without padding.
    drawn = model(torch.cat(order, 1), attention_mask=torch.cat(masks, 1), force_routing=0.4)
    assert torch.equal(drawn.run[:, real], model(ids, force_routing=0.4).run)


@torch.no_grad()
def test_a_batch_of_mixed_lengths_answers_as_one_by_one(model, ids):
    short = ids[:1, :9]
    padded = torch.cat([torch.zeros(1, 31, dtype=torch.long), short], 1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :31] = 0
    both = model.generate(torch.cat([padded, ids[1:]]), attention_mask=mask, **GREEDY)
    assert torch.equal(both[0, 31:], model.generate(short, **GREEDY)[0])
    assert torch.equal(both[1], model.generate(ids[1:], **GREEDY)[0])


@torch.no_grad()
def test_positions_are_obeyed(model, ids):
    full = model(ids)
    positions = torch.arange(40).expand(2, -1)
    assert torch.equal(model(ids, position_ids=positions).logits, full.logits)
    # Rotary attention sees distances alone.
    torch.testing.assert_close(
        model(ids, position_ids=positions + 100).logits, full.logits, rtol=1e-3, atol=1e-4
    )
    stretched = model(ids, position_ids=positions * 3).logits
    assert (stretched - full.logits).abs().max() > 1e-2


@torch.no_grad()
def test_four_dimensional_masks(model, ids):
    full = model(ids).logits
    causal = torch.ones(40, 40).tril().bool()
    additive = torch.zeros(40, 40).masked_fill(~causal, float("-inf"))
    for mask in (causal, additive):
        got = model(ids, attention_mask=mask.expand(2, 1, -1, -1), use_cache=False).logits
        torch.testing.assert_close(got, full, **CLOSE)
    blind = causal & (torch.arange(40) != 3)
    got = model(ids, attention_mask=blind.expand(2, 1, -1, -1), use_cache=False).logits
    torch.testing.assert_close(got[:, :3], full[:, :3], **CLOSE)
    assert (got[:, 4] - full[:, 4]).abs().max() > 1e-3


@torch.no_grad()
def test_generation_is_the_same_with_any_cache(model, ids):
    want = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), want)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), want)
    step_by_step = ids
    for _ in range(GREEDY["max_new_tokens"]):
        chosen = model(step_by_step).logits[:, -1:].argmax(-1)
        step_by_step = torch.cat([step_by_step, chosen], 1)
    assert torch.equal(step_by_step, want)


@torch.no_grad()
def test_sampling_and_beams(model, ids):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(ids, max_new_tokens=15, do_sample=True, top_k=20, pad_token_id=0)

    assert torch.equal(sample(1), sample(1)) and not torch.equal(sample(1), sample(2))

    def log_probability(text):
        logp = model(text[:, :-1]).logits[:, 39:].log_softmax(-1)
        return logp.gather(-1, text[:, 40:, None]).sum((1, 2))

    beams = {
        cached: model.generate(ids, num_beams=4, use_cache=cached, **GREEDY)
        for cached in (True, False)
    }
    assert torch.equal(beams[True], beams[False])
    greedy = model.generate(ids, **GREEDY)
    assert (log_probability(beams[True]) >= log_probability(greedy) - 1e-4).all()


@torch.no_grad()
def test_a_mask_of_another_length_is_refused(model, ids):
    cache = model(ids).past_key_values
    with pytest.raises(ShapeError, match=r"\[2, 1\]; wanted \[2, 41\] \(40 cached and 1 new"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)
