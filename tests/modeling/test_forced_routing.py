"""force_routing in the transformers model: forward, cached steps, generate, training mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexidepth import reference
from flexidepth.errors import ShapeError, ValueOutOfRangeError
from flexidepth.routing import resolve_force_routing, skip_ratio_mask

from ..engine.conftest import tiny_config, tiny_model

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["multiplier", "straight_through"])
def model(request):
    return tiny_model(tiny_config(gate=request.param))


@torch.no_grad()
def test_none_is_the_adapter_path(model, ids):
    """All routed layers skipped: nothing of them but norm and adapter touches the stream."""
    inner = model.model
    h = inner.embed_tokens(ids)
    step = _step(model, ids)
    for layer in inner.layers:
        if layer.routed:
            y = reference.rms_norm(h, layer.post_attention_layernorm.weight, inner.norm.eps)
            h = h + layer.adapter(y)
        else:
            h = layer(h, step, torch.tensor(0.5), None)[0]
    want = model.lm_head(inner.norm(h))
    out = model(ids, force_routing="none", use_cache=False)
    torch.testing.assert_close(out.logits, want, rtol=1e-5, atol=1e-5)
    assert not out.run.any() and (out.gates > 0).all()


def _step(model, ids):
    from flexidepth.layers import StepInputs

    config, tokens = model.config, ids.shape[1]
    positions = torch.arange(tokens).expand(len(ids), -1)
    freq = reference.rope_inv_freq(config.head_dim, config.rope_parameters)
    mask = reference.attention_mask(positions, positions)
    return StepInputs(*reference.rope_cos_sin(positions, freq, torch.float32), mask, None)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[], [2], [1, 3], [3, 1], [1, 2, 3]])
def test_a_list_names_the_layers_that_run(model, ids, layers):
    out = model(ids, force_routing=layers)
    want = [layer in layers for layer in model.config.routing_layers]
    assert (out.run == torch.tensor(want)).all()
    if len(layers) in (0, 3):
        word = "all" if layers else "none"
        assert torch.equal(out.logits, model(ids, force_routing=word).logits)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 1 / 3, 0.5, 1.0])
def test_a_ratio_skips_an_exact_count_by_position(model, ids, ratio):
    out = model(ids, force_routing=ratio)
    assert ((~out.run).sum(-1) == round(ratio * 3)).all()
    mask = skip_ratio_mask(round(ratio * 3), 0, 0, ids.shape[1], 3).bool()
    assert (out.run == mask).all()  # the same in every row of the batch


@torch.no_grad()
def test_the_own_decisions_replayed_change_nothing(model, ids):
    own = model(ids[:1])
    assert 0.05 < own.run.float().mean() < 0.95
    again = model(ids[:1], force_routing=own.run[0])
    assert torch.equal(again.logits, own.logits) and torch.equal(again.gates, own.gates)
    other = model(ids[:1], force_routing=~own.run[0])
    assert (other.logits - own.logits).abs().max() > 1e-3


@torch.no_grad()
def test_a_mask_is_weighed_by_the_models_own_gates(ids):
    mask = torch.ones(40, 3, dtype=torch.bool)
    multiplier = tiny_model(tiny_config())
    replayed = multiplier(ids, force_routing=mask).logits
    assert (replayed - multiplier(ids, force_routing="all").logits).abs().max() > 1e-3
    straight = tiny_model(tiny_config(gate="straight_through"))
    assert torch.equal(
        straight(ids, force_routing=mask).logits, straight(ids, force_routing="all").logits
    )


@pytest.mark.parametrize("force", ["all", "none", "dense", [1, 3], 0.4])
@torch.no_grad()
def test_training_mode_computes_the_same(model, ids, force):
    skipping = model(ids, force_routing=force)
    both = model.train()(ids, force_routing=force)
    model.eval()
    torch.testing.assert_close(both.logits, skipping.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(both.run, skipping.run)
    assert bool(both.gates.isnan().all()) == (force == "dense")


@pytest.mark.parametrize("force", ["all", "none", "dense", [2], 0.4])
@torch.no_grad()
def test_generation_keeps_to_it_in_cached_steps_and_behind_padding(model, ids, force):
    want = model.generate(ids, force_routing=force, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, force_routing=force, **GREEDY), want)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 40)], 1).long()
    got = model.generate(padded, attention_mask=mask, force_routing=force, **GREEDY)
    assert torch.equal(got[:, 5:], want)


@torch.no_grad()
def test_a_generation_is_replayed_from_its_mask(model, ids):
    text = model.generate(ids[:1], **GREEDY)
    recorded = model(text[:, :-1]).run[0]  # the last token is chosen, never computed
    replayed = model.generate(ids[:1], force_routing=recorded, **GREEDY)
    assert torch.equal(replayed, text)
    with pytest.raises(ShapeError, match="covers 48 tokens, position 48 is needed"):
        model.generate(ids[:1], force_routing=recorded[:-1], **GREEDY)


@pytest.mark.parametrize(
    ("force", "error", "message"),
    [
        ("al", ValueOutOfRangeError, "'al'; wanted 'all', 'none', 'dense'"),
        (
            [0, 2],
            ValueOutOfRangeError,
            r"layers \[0\] are not routed; this model routes \[1, 2, 3\]",
        ),
        ([True, False, True], ValueOutOfRangeError, "True in a list of layers"),
        ([1.0], ValueOutOfRangeError, "1.0 in a list of layers"),
        (True, ValueOutOfRangeError, "bool True; wanted 'all'"),
        (1.01, ValueOutOfRangeError, "skip ratio is 1.01"),
        (float("nan"), ValueOutOfRangeError, "skip ratio is nan"),
        (torch.full((40, 3), 0.7), ValueOutOfRangeError, "mask holds 0.69.*compare gates"),
        (torch.full((40, 3), float("nan")), ValueOutOfRangeError, "mask holds nan"),
        (torch.ones(40, 2), ShapeError, r"mask is \[40, 2\]; wanted \[tokens, 3\]"),
        (torch.ones(3), ShapeError, r"mask is \[3\]"),
        (torch.ones(39, 3).bool(), ShapeError, "covers 39 tokens, position 39 is needed"),
    ],
)
def test_refused(model, ids, force, error, message):
    with pytest.raises(error, match=message):
        model(ids, force_routing=force)


def test_masks_are_told_apart_by_content():
    config = tiny_config()
    a = torch.tensor([[True, False, True]])
    key = resolve_force_routing(a, config).key
    assert resolve_force_routing(a.clone().to(torch.uint8), config).key == key
    a[0, 0] = False  # the same object with another content is another routing
    assert resolve_force_routing(a, config).key != key


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(0, 12),
    share=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**64 - 1),
    start=st.integers(0, 2**40),
    length=st.integers(0, 20),
    cut=st.integers(0, 20),
)
def test_draws_are_exact_and_the_same_in_any_chunks(num, share, seed, start, length, cut):
    skipped, middle = round(share * num), start + min(cut, length)
    whole = skip_ratio_mask(skipped, seed, start, start + length, num)
    assert whole.shape == (length, num) and ((whole == 0).sum(1) == skipped).all()
    parts = [
        skip_ratio_mask(skipped, seed, a, b, num)
        for a, b in ((start, middle), (middle, start + length))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_draws_never_change_between_versions():
    """Written down, so that a benchmark of today can be repeated."""
    assert skip_ratio_mask(2, 7, 100, 103, 5).tolist() == [
        [0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1],
        [1, 0, 0, 1, 1],
    ]
