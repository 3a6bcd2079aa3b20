"""What gradients reach, how they are saved and accumulated, and that training learns."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from flexidepth import reference
from flexidepth.errors import UnsupportedError, ValueOutOfRangeError

from ..engine.conftest import tiny_config, tiny_model


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


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(ids, frozen, reentrant):
    def gradients(checkpointing):
        model = tiny_model(tiny_config()).train()
        if frozen:
            model.freeze_base()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys() and len(plain) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, rtol=1e-4, atol=1e-6)


def test_no_cache_while_checkpointing(ids):
    model = tiny_model(tiny_config()).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueOutOfRangeError, match="use_cache=False"):
        model(ids, use_cache=True)
    with torch.no_grad():
        assert model(ids, use_cache=True).past_key_values.get_seq_length() == 40


def test_the_threshold_itself_passes_no_gradient(ids):
    """With hard weights neither w nor 1 - w is there, and nothing reaches the router."""
    model = tiny_model(tiny_config()).train()
    model(ids, labels=ids, force_routing=[2]).loss.backward()
    for layer in model.model.layers[1:]:
        gradient = layer.router.enc.weight.grad
        assert gradient is None or not gradient.any()
    assert model.model.layers[1].adapter.down_proj.weight.grad.any()
    assert model.model.layers[2].adapter.down_proj.weight.grad is None


def test_multiplier_gradient_is_that_of_the_formula(ids):
    """d loss / d w against finite differences, in float64 and within one set of decisions."""
    model = tiny_model(tiny_config(router_bias=True)).double().train()
    bias = model.model.layers[2].router.head.bias
    own = model(ids[:1], labels=ids[:1])
    own.loss.backward()
    step, losses = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            bias += sign * step
            losses.append(model(ids[:1], labels=ids[:1], force_routing=own.run[0]).loss)
            bias -= sign * step
    slope = (losses[0] - losses[1]) / (2 * step)
    assert bias.grad.abs() > 1e-4
    torch.testing.assert_close(bias.grad[0], slope, rtol=1e-5, atol=1e-8)


def test_straight_through_gradient_is_the_difference_of_the_two_paths(ids):
    """By hand for the last layer: d out / d w = output had the token run - output had it skipped."""
    model = tiny_model(tiny_config(gate="straight_through", routing_layers=[3])).train()
    captured = {}
    layer = model.model.layers[3]
    layer.register_forward_hook(lambda _, inputs, output: captured.update(i=inputs, o=output))
    model(ids, use_cache=False)
    h, step = captured["i"][0].detach(), captured["i"][1]
    out, gates, run = layer(h, step, torch.tensor(0.5), captured["i"][3])
    assert 0 < run.float().mean() < 1
    direction = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * direction).sum(), gates)
    x = layer.input_layernorm(h)
    h1 = h + layer.self_attn(x, *layer.self_attn.keys_values(x, step), step)
    full = h1 + layer.mlp(layer.post_attention_layernorm(h1))
    short = h + layer.adapter(layer.post_attention_layernorm(h))
    torch.testing.assert_close(out, torch.where(run[..., None], full, short))
    torch.testing.assert_close(got, ((full - short) * direction).sum(-1), rtol=1e-4, atol=1e-5)


def test_straight_through_training_skips_the_weights_gradients_do_not_need(ids):
    """The path a token did not take gives its value, and no gradient to its weights."""
    model = tiny_model(tiny_config(gate="straight_through", router_bias=True)).train()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.router.head.bias.fill_(50.0)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers[1:]:
        assert layer.adapter.down_proj.weight.grad is None
        assert layer.mlp.down_proj.weight.grad.any()


@pytest.mark.parametrize("gate", ["multiplier", "straight_through"])
def test_training_lowers_loss_and_penalty_with_a_frozen_base(ids, gate):
    model = tiny_model(tiny_config(gate=gate, router_bias=True)).train()
    model.freeze_base()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    totals = []
    for _ in range(25):
        out = model(ids, labels=ids)
        total = out.loss + 0.05 * out.gates.sum(-1).pow(2).mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0] - 0.2
    for name, parameter in model.named_parameters():
        routed = ".router." in name or ".adapter." in name
        assert torch.equal(before[name], parameter) != routed, name


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


def test_a_multipliers_gradients_are_those_of_both_paths_computed_and_combined(ids):
    """Each token goes one way only, which loses nothing: the other way's factor is 0, and so is its derivative."""
    model = tiny_model(tiny_config(routing_layers=[3])).train()
    captured = {}
    layer = model.model.layers[3]
    layer.register_forward_hook(lambda _, inputs, output: captured.update(i=inputs, o=output))
    model(ids, use_cache=False)
    h, step, _, decision = captured["i"]
    h = h.detach().requires_grad_()
    out, _, run = layer(h, step, torch.tensor(0.5), decision)
    assert run.any() and not run.all()
    direction = torch.randn_like(out)
    hard = run[..., None].float()
    x = layer.input_layernorm(h)
    h1 = h + hard * layer.self_attn(x, *layer.self_attn.keys_values(x, step), step)
    y = layer.post_attention_layernorm(h1)
    w = layer.router(x)[..., None]
    by_hand = h1 + hard * w * layer.mlp(y) + (1 - hard) * (1 - w) * layer.adapter(y)
    torch.testing.assert_close(out, by_hand)
    parameters = [h, *layer.parameters()]
    got = torch.autograd.grad((out * direction).sum(), parameters)
    want = torch.autograd.grad((by_hand * direction).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_base_models_hidden_state_comes_from_the_same_pass(ids):
    model = tiny_model(tiny_config(routing_layers=[2, 3])).train()
    model.freeze_base()
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(0))
    out = model.model(ids, use_cache=False, output_base_hidden_state=True)
    assert len(seen) == 1  # the layers before the first routed one serve both
    assert out.last_hidden_state.requires_grad and not out.base_hidden_state.requires_grad
    want = model.model(ids, use_cache=False, force_routing="all").last_hidden_state
    torch.testing.assert_close(out.base_hidden_state, want)
    assert model.model(ids, use_cache=False).base_hidden_state is None


@pytest.mark.parametrize("arguments", [{"use_cache": True}, {}])
def test_no_cache_beside_the_base_models_hidden_state(ids, arguments):
    cache = None if arguments else DynamicCache()
    with pytest.raises(ValueOutOfRangeError, match="use_cache=False and no past_key_values"):
        tiny_model(tiny_config()).model(
            ids, past_key_values=cache, output_base_hidden_state=True, **arguments
        )


def test_a_gate_offset_decides_as_a_threshold_does(ids):
    """w = sigmoid(logit - b) > 1/2 where and only where sigmoid(logit) > sigmoid(b)."""
    model = tiny_model(tiny_config(gate="straight_through"))
    offsets = torch.tensor([-0.15, 0.2])
    got = model(ids, gate_offset=offsets)
    plain = model(ids)
    assert not torch.equal(got.run, plain.run)
    for row, offset in enumerate(offsets):
        torch.testing.assert_close(
            torch.logit(got.gates[row, :, 0]), torch.logit(plain.gates[row, :, 0]) - offset
        )
        model.config.router_thresholds = [float(torch.sigmoid(offset))] * 3
        want = model(ids)
        assert torch.equal(got.run[row], want.run[row])
        torch.testing.assert_close(got.logits[row], want.logits[row])


def test_the_router_stays_in_float32_under_autocast(ids):
    model = tiny_model(tiny_config())
    router = model.model.layers[2].router
    x = torch.randn(2, 5, model.config.hidden_size)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x), plain)


def test_checkpointing_begins_where_something_trains(ids):
    model = tiny_model(tiny_config(routing_layers=[2, 3])).train()
    model.freeze_base()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    calls = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    model(ids, labels=ids).loss.backward()
    assert calls == [1, 1, 2, 2]


def test_sparsemixer_draws_decisions_and_damps_the_less_likely_ones():
    gates = torch.full((20000,), 0.8).requires_grad_()
    run, fed, adapted = reference.sampled_scales(gates)
    assert run.float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert not fed[~run].any() and not adapted[run].any()
    torch.testing.assert_close(fed[run], gates[run])
    unlikely = adapted[~run].detach()
    assert sorted({round(value, 4) for value in unlikely.tolist()}) == [0.0667, 0.2]
    assert (unlikely < 0.1).float().mean().item() == pytest.approx(0.75, abs=0.03)
    (slope,) = torch.autograd.grad((fed + adapted).sum(), gates)
    assert torch.equal(slope, torch.where(run, 1.0, -1.0))


def test_sparsemixer_in_a_model(ids):
    model = tiny_model(tiny_config(router_bias=True))
    model.sample_gates()
    with torch.no_grad():
        assert torch.equal(model(ids).run, model(ids).run)  # evaluation draws nothing
    model.train()
    first, second = model(ids, labels=ids), model(ids)
    assert not torch.equal(first.run, second.run)
    first.loss.backward()
    assert model.model.layers[1].router.enc.weight.grad.any()
    with pytest.raises(UnsupportedError, match="straight_through"):
        tiny_model(tiny_config(gate="straight_through")).sample_gates()
