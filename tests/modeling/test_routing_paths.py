"""Both-paths training, real-skip evaluation, gates, caches, padding, saving."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexidepth import reference
from flexidepth.modeling import FlexiDepthForCausalLM

from ..engine.conftest import tiny_config, tiny_model

VARIANTS = [
    {},
    {"gate": "straight_through"},
    {"router_order": "tanh_norm", "router_bias": True},
    {"router_thresholds": [0.3, 0.5, 0.7]},
]


@pytest.fixture
def ids():
    return torch.randint(0, 211, (2, 40))


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_real_skip_equals_both_paths(ids, changes):
    model = tiny_model(tiny_config(**changes))
    skipping = model(ids)
    assert 0.05 < skipping.run.float().mean() < 0.95
    both = model.train()(ids)
    torch.testing.assert_close(both.logits, skipping.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(both.run, skipping.run)


@torch.no_grad()
def test_a_routed_layer_is_the_published_formula(ids):
    """One routed layer written out by hand from the paper."""
    config = tiny_config(num_hidden_layers=1, routing_layers=[0], router_thresholds=0.5)
    model = tiny_model(config)
    layer, eps = model.model.layers[0], config.rms_norm_eps
    h = model.model.embed_tokens(ids)
    x = reference.rms_norm(h, layer.input_layernorm.weight, eps)
    z = torch.tanh(reference.rms_norm(x @ layer.router.enc.weight.T, layer.router.norm.weight, eps))
    w = torch.sigmoid((z @ layer.router.dec.weight.T @ layer.router.head.weight.T).squeeze(-1))
    run = w > 0.5
    cos, sin = reference.rope_cos_sin(
        torch.arange(40), reference.rope_inv_freq(16, config.rope_parameters), torch.float32
    )
    attn = layer.self_attn

    def heads(weight):
        return (x @ weight.T).view(2, 40, -1, 16).transpose(1, 2)

    q, k = (reference.apply_rope(heads(p.weight), cos, sin) for p in (attn.q_proj, attn.k_proj))
    mask = reference.attention_mask(torch.arange(40), torch.arange(40))
    a = (
        reference.attention(q, k, heads(attn.v_proj.weight), mask).transpose(1, 2).flatten(2)
        @ attn.o_proj.weight.T
    )
    h1 = h + run[..., None] * a
    y = reference.rms_norm(h1, layer.post_attention_layernorm.weight, eps)
    out = h1 + torch.where(
        run[..., None], w[..., None] * layer.mlp(y), (1 - w)[..., None] * layer.adapter(y)
    )
    want = reference.rms_norm(out, model.model.norm.weight, eps) @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-5, atol=1e-5)


def test_multiplier_gradient_reaches_the_router_and_not_the_base(ids):
    model = tiny_model(tiny_config()).train()
    model.freeze_base()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        trained = ".router." in name or ".adapter." in name
        assert (parameter.grad is not None) == trained, name
    assert model.model.layers[2].router.enc.weight.grad.abs().sum() > 0
    assert model.model.layers[2].adapter.down_proj.weight.grad.abs().sum() > 0


def test_straight_through_starts_at_the_base_model_and_learns(ids):
    config = tiny_config(gate="straight_through", router_bias=True)
    model = tiny_model(config).train()
    with torch.no_grad():
        for layer in model.model.layers:
            if layer.routed:
                layer.router.head.weight.zero_()
                layer.router.head.bias.fill_(2.0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, model(ids, force_routing="all").logits)
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[1].router.head.bias.grad.abs() > 0


def test_gradient_checkpointing_gives_the_same_gradients(ids):
    def gradients(checkpointing):
        model = tiny_model(tiny_config()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys() and len(plain) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, rtol=1e-4, atol=1e-6)


def test_loss_counts_items_as_the_trainer_does(ids):
    model = tiny_model(tiny_config())
    labels = ids.clone()
    labels[:, :10] = -100
    whole = model(ids, labels=labels).loss
    halves = [
        model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=60).loss
        for i in range(2)
    ]
    torch.testing.assert_close(sum(halves), whole, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_caches_and_padding_change_nothing(ids):
    model = tiny_model(tiny_config())
    full = model(ids)
    settings = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), want)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), want)
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 7), torch.ones(2, 40)], 1).long()
    left = model(padded, attention_mask=mask)
    torch.testing.assert_close(left.logits[:, 7:], full.logits, rtol=1e-4, atol=1e-5)
    right = model(torch.cat([ids, padded[:, :7]], 1), attention_mask=mask.flip(1))
    torch.testing.assert_close(right.logits[:, :40], full.logits, rtol=1e-4, atol=1e-5)
    beams = model.generate(ids, num_beams=3, **settings)
    assert beams.shape[0] == 2


@torch.no_grad()
def test_save_and_load_through_the_auto_classes(tmp_path, ids):
    model = tiny_model(tiny_config(router_bias=True, router_thresholds=[0.2, 0.4, 0.6]))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, FlexiDepthForCausalLM)
    assert again.config.router_thresholds == [0.2, 0.4, 0.6]
    assert torch.equal(again(ids).logits, model(ids).logits)
