"""A routed layer: the published formula, real skipping, thresholds, types."""

from __future__ import annotations

import pytest
import torch

from flexidepth import reference
from flexidepth.errors import UnsupportedError, ValueOutOfRangeError
from flexidepth.layers import StepInputs

from ..engine.conftest import tiny_config, tiny_model

VARIANTS = [
    {},
    {"gate": "straight_through"},
    {"router_order": "tanh_norm", "router_bias": True},
    {"router_thresholds": [0.3, 0.5, 0.7]},
]


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


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.0, 0.3), (1.0, 1.0), (0.0, 0.0)])
def test_attention_of_chosen_tokens_in_one_call_is_that_of_each_sequence(ids, shares):
    """What GPUs take, however unlike the sequences are; gradients too."""
    attention = tiny_model(tiny_config()).model.layers[1].self_attn
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 40, tiny_config().hidden_size, generator=generator, requires_grad=True)
    positions = torch.arange(40).expand(2, -1)
    inv_freq = reference.rope_inv_freq(16, tiny_config().rope_parameters)
    cos, sin = reference.rope_cos_sin(positions, inv_freq, torch.float32)
    mask = reference.attention_mask(torch.arange(40), torch.arange(40)).repeat(2, 1, 1)
    mask[1, 20:, :20] = False  # packed
    step = StepInputs(cos, sin, mask)
    run = torch.rand(2, 40, generator=generator) < torch.tensor(shares)[:, None]
    found = []
    for selected in (attention.selected, attention._selected_together):
        out = selected(x, run, *attention.keys_values(x, step), step)
        (slope,) = torch.autograd.grad(out.square().sum() + 0 * x.sum(), x)
        found.append((out, slope))
    assert found[0][0].shape == (int(run.sum()), x.shape[-1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_skipped_tokens_reach_neither_attention_nor_feed_forward(ids):
    """NaN for weights that nobody should read; keys and values are of every token."""
    model = tiny_model(tiny_config())
    want = model(ids, force_routing="none").logits
    for layer in model.model.layers[1:]:
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.fill_(float("nan"))
    assert torch.equal(model(ids, force_routing="none").logits, want)
    assert model(ids, force_routing=[2]).logits.isnan().all()
    model = tiny_model(tiny_config())
    want = model(ids, force_routing="all").logits
    for layer in model.model.layers[1:]:
        layer.adapter.down_proj.weight.fill_(float("nan"))
    assert torch.equal(model(ids, force_routing="all").logits, want)


@torch.no_grad()
def test_thresholds_by_layer(ids):
    model = tiny_model(tiny_config(router_thresholds=[0.0, 1.0, 0.5]))
    out = model(ids)
    assert out.run[..., 0].all() and not out.run[..., 1].any()
    assert 0.05 < out.run[..., 2].float().mean() < 0.95
    assert torch.equal(out.run, out.gates > torch.tensor([0.0, 1.0, 0.5]))
    model.config.router_thresholds = 1.0
    assert not model(ids).run.any()
    model.config.router_thresholds = [0.5, 0.5]
    with pytest.raises(ValueOutOfRangeError, match="2 values; this model routes 3"):
        model(ids)


@torch.no_grad()
def test_a_gate_on_its_threshold_skips(ids):
    model = tiny_model(tiny_config(router_bias=True))
    for layer in model.model.layers[1:]:
        layer.router.head.weight.zero_()
        layer.router.head.bias.zero_()
    out = model(ids)
    assert (out.gates == 0.5).all() and not out.run.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_near_float32(ids, dtype):
    wide = tiny_model(tiny_config())
    narrow = tiny_model(tiny_config()).to(dtype)
    # Replayed decisions: a gate next to its threshold may fall on the other side.
    own = wide(ids[:1])
    got = narrow(ids[:1], force_routing=own.run[0])
    assert got.logits.dtype == dtype and got.gates.dtype == torch.float32
    # A layer rounds its stream about eight times; four layers add these up like a random walk.
    error = (got.logits.float() - own.logits).pow(2).mean().sqrt() / own.logits.pow(2).mean().sqrt()
    assert error < 6 * torch.finfo(dtype).eps


@torch.no_grad()
def test_a_model_without_routed_layers_is_plain(ids):
    out = tiny_model(tiny_config(routing_layers=[]))(ids)
    assert out.gates is None and out.run is None and out.logits.isfinite().all()


@torch.no_grad()
def test_hidden_states_and_last_logits(ids):
    model = tiny_model(tiny_config())
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(ids, logits_to_keep=3).logits, out.logits[:, -3:])
    picked = torch.tensor([0, 7])
    assert torch.equal(model(ids, logits_to_keep=picked).logits, out.logits[:, picked])
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(embedded.logits, out.logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"force_ruoting": "all"}, ValueOutOfRangeError, "did you mean 'force_routing'"),
        ({"cu_seq_lens_q": [0, 40]}, ValueOutOfRangeError, "no argument 'cu_seq_lens_q'"),
        ({"output_attentions": True}, UnsupportedError, "output_attentions"),
        ({"return_dict": False}, UnsupportedError, "to_tuple"),
        ({"inputs_embeds": torch.zeros(2, 40, 48)}, ValueOutOfRangeError, "both of input_ids"),
        ({"input_ids": None}, ValueOutOfRangeError, "neither of input_ids"),
        ({"attention_mask": torch.ones(2, 39)}, ValueError, r"\[2, 39\]; wanted \[2, 40\]"),
    ],
)
def test_refused_arguments(ids, arguments, error, message):
    model = tiny_model(tiny_config())
    with pytest.raises(error, match=message):
        model(**{"input_ids": ids, **arguments})


def test_arguments_that_transformers_hands_to_every_model(ids):
    tiny_model(tiny_config())(
        ids,
        token_type_ids=torch.zeros_like(ids),
        output_attentions=False,
        return_dict=True,
        task_ids=None,
    )
