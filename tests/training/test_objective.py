"""The loss against the formula, computed directly and for every token at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexidepth.training.objective import (
    Counts,
    RoutingObjective,
    Weights,
    adapter_distances,
    skip_penalty,
)
from flexidepth.training.packing import block_causal_mask

from ..engine.conftest import VOCAB, tiny_config, tiny_model


def packed(documents: list[list[int]], length: int = 24) -> dict[str, torch.Tensor]:
    """Rows of several documents of given lengths each, padded to `length`."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (len(documents), length), generator=generator)
    labels, numbers = ids.clone(), torch.full_like(ids, -1)
    positions = torch.arange(length).repeat(len(documents), 1)
    for row, lengths in enumerate(documents):
        start = 0
        for number, size in enumerate(lengths):
            own = slice(start, start + size)
            numbers[row, own], positions[row, own] = number, torch.arange(size)
            labels[row, start] = -100
            start += size
        labels[row, start:] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "document_ids": numbers,
        "attention_mask": block_causal_mask(numbers),
    }


@pytest.fixture
def batch():
    return packed([[10, 9], [24], [5, 6, 7]])


@pytest.fixture(params=["multiplier", "straight_through"])
def model(request):
    model = tiny_model(tiny_config(gate=request.param, router_bias=True)).train()
    model.freeze_base()
    return model


def gradients(model, loss):
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {n: g for n, g in zip(trained, found, strict=True) if g is not None}


def documents_alone(model, batch):
    """(logits, gates, base logits, ids) of each document by itself, without packing or padding."""
    for row, numbers in enumerate(batch["document_ids"]):
        for number in range(int(numbers.max()) + 1):
            ids = batch["input_ids"][row][numbers == number][None]
            out = model(ids)
            with torch.no_grad():
                base = model(ids, force_routing="dense").logits
            yield out.logits[0], out.gates[0], base[0], ids[0]


def test_loss_of_packed_documents_is_that_of_each_alone(model, batch):
    weights = Weights(lm=0.7, kl=0.4, skip_penalty=0.02)
    got = RoutingObjective(model)(**batch, weights=weights)
    lm = kl = penalty = 0.0
    labels = tokens = 0
    for logits, gates, base, ids in documents_alone(model, batch):
        lm = lm + F.cross_entropy(logits[:-1], ids[1:], reduction="sum")
        kl = kl + F.kl_div(
            logits[:-1].log_softmax(-1),
            base[:-1].log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        penalty = penalty + gates.sum(-1).pow(2).sum()
        labels, tokens = labels + len(ids) - 1, tokens + len(ids)
    want = 0.7 * lm / labels + 0.4 * kl / labels + 0.02 * penalty / tokens
    torch.testing.assert_close(got["loss"], want)
    assert (int(got["labels"]), int(got["tokens"].sum())) == (labels, tokens)
    torch.testing.assert_close(got["lm"], lm.detach())
    torch.testing.assert_close(got["kl"], kl.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["penalty"], penalty.detach())
    ours, theirs = gradients(model, got["loss"]), gradients(model, want)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_accumulated_batches_give_the_gradient_of_one(model, batch):
    """Batches of different numbers of labels and tokens, each with the counts of all."""
    weights = Weights(lm=1.0, kl=0.5, skip_penalty=0.05)
    objective = RoutingObjective(model)
    whole = gradients(model, objective(**batch, weights=weights)["loss"])
    labels = torch.tensor(float((batch["labels"][:, 1:] != -100).sum()))
    counts = Counts(labels, (batch["document_ids"] >= 0).sum().float())
    parts = [
        gradients(
            model,
            objective(
                **{name: value[row : row + 1] for name, value in batch.items()},
                weights=weights,
                counts=counts,
            )["loss"],
        )
        for row in range(3)
    ]
    for name, gradient in whole.items():
        total = sum(part[name] for part in parts if name in part)
        torch.testing.assert_close(total, gradient, rtol=1e-3, atol=1e-6)


def test_penalty_by_hand():
    gates = torch.tensor([[[0.5, 1.0], [0.25, 0.25], [1.0, 1.0]]])
    mask = torch.tensor([[True, True, False]])
    assert skip_penalty(gates, mask) == pytest.approx(1.5**2 + 0.5**2)


def test_skipped_counts_leave_padding_out(model, batch):
    got = RoutingObjective(model)(**batch, weights=Weights())
    want = torch.zeros(3, dtype=torch.long)
    for _, gates, _, _ in documents_alone(model, batch):
        want += (gates <= 0.5).sum(0)
    assert torch.equal(got["skipped"].sum(0), want) and want.sum() > 0


def test_offsets_are_by_sequence(model, batch):
    objective = RoutingObjective(model)
    offset = torch.tensor([-30.0, 0.0, 30.0])
    got = objective(**batch, weights=Weights(), gate_offset=offset)
    plain = objective(**batch, weights=Weights())
    assert not got["skipped"][0].any()
    assert torch.equal(got["skipped"][1], plain["skipped"][1])
    assert (got["skipped"][2] == got["tokens"][2]).all()


def test_the_price_that_balances_the_slope_leaves_none(batch):
    """With one routed layer, whose price reaches no other."""
    config = tiny_config(gate="straight_through", router_bias=True, routing_layers=[3])
    model = tiny_model(config).train()
    model.freeze_base()
    objective = RoutingObjective(model)

    def left_over(price):
        weights = Weights(kl=0.5)
        got = objective(**batch, weights=weights, gate_offset=torch.zeros(3), price=price)
        got["loss"].backward()
        return got["slopes"].means() * got["tokens"].sum()

    slopes = left_over(torch.zeros(3))
    assert slopes.abs().min() > 1e-4
    full = batch["document_ids"].ge(0).all(1)  # the gates of padding have no price
    left = left_over(-slopes)
    torch.testing.assert_close(left[full], torch.zeros_like(left[full]), rtol=0, atol=1e-6)
    assert (left.abs() < slopes.abs()).all() and full.any()


def test_adapter_distance_of_an_idle_adapter_is_one(batch):
    model = tiny_model(tiny_config())
    inputs = {n: batch[n] for n in ("input_ids", "position_ids", "attention_mask")}
    mask = batch["document_ids"] >= 0
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.adapter.down_proj.weight.zero_()
    distances = adapter_distances(model, inputs, mask)
    torch.testing.assert_close(distances, mask.sum() * torch.ones(3))


def test_adapter_distance_by_hand(batch):
    model = tiny_model(tiny_config())
    inputs = {n: batch[n] for n in ("input_ids", "position_ids", "attention_mask")}
    mask = batch["document_ids"] >= 0
    got = adapter_distances(model, inputs, mask)
    hidden = model.model(**inputs, output_hidden_states=True, force_routing="dense")
    layer = model.model.layers[2]
    h, out = hidden.hidden_states[2], hidden.hidden_states[3]
    missed = layer.adapter(layer.post_attention_layernorm(h)) - (out - h)
    share = 1 / out.pow(2).sum(-1)
    want = (missed.pow(2).sum(-1) * share)[mask].sum() / ((out - h).pow(2).sum(-1) * share)[
        mask
    ].mean()
    torch.testing.assert_close(got[1], want)


def test_adapters_learn_without_the_router_or_the_base(batch):
    model = tiny_model(tiny_config()).train()
    model.freeze_base()
    objective = RoutingObjective(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(20):
        out = objective(**batch, weights=Weights(lm=0.0, adapter=1.0))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for n, p in model.named_parameters() if ".adapter." not in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_mixed_precision_with_a_half_precision_base(batch, dtype):
    model = tiny_model(tiny_config(gate="straight_through", router_bias=True)).train()
    want = RoutingObjective(model)(**batch, weights=Weights(kl=1.0))
    model.to(dtype)
    for name, module in model.named_modules():
        if name.endswith((".router", ".adapter")):
            module.float()
    model.freeze_base()
    with torch.autocast("cpu", dtype=dtype):
        got = RoutingObjective(model)(**batch, weights=Weights(kl=1.0))
    got["loss"].backward()
    assert model.model.layers[2].router.enc.weight.grad.dtype == torch.float32
    torch.testing.assert_close(got["loss"], want["loss"].detach(), rtol=0.1, atol=0.1)


def test_exploring_gates_learn_where_they_skip(batch):
    config = tiny_config(gate="straight_through", router_bias=True, routing_layers=[3])
    model = tiny_model(config).train()
    model.freeze_base()
    model.explore_skips(0.3)
    objective = RoutingObjective(model)
    seen = {}
    layer = model.model.layers[3]

    def keep(_, arguments, output):
        if output[1].requires_grad:
            output[1].retain_grad()
            seen.update(gates=output[1], run=output[2], credit=arguments[1].credits[3])

    layer.register_forward_hook(keep)
    got = objective(**batch, weights=Weights(kl=1.0), gate_offset=torch.zeros(3))
    got["loss"].backward()
    gates, run, credit = seen["gates"], seen["run"], seen["credit"]
    explored = (gates > 0.5) & ~run
    assert 0.1 < explored.sum() / (gates > 0.5).sum() < 0.5
    assert torch.equal(credit, (~run).float() + 3 * explored)
    assert not gates.grad[run].any()
    real = batch["document_ids"] >= 0
    assert gates.grad[~run & real].abs().max() > 0
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"]).run, model(batch["input_ids"]).run)


def test_the_price_balances_the_slopes_of_explored_gates_too():
    batch = packed([[10, 14], [24], [5, 6, 13]])  # the gates of padding would have no price
    config = tiny_config(gate="straight_through", router_bias=True, routing_layers=[3])
    model = tiny_model(config).train()
    model.freeze_base()
    model.explore_skips(0.3)
    objective = RoutingObjective(model)

    def left_over(price):
        torch.manual_seed(3)  # the same gates explored
        got = objective(**batch, weights=Weights(kl=1.0), gate_offset=torch.zeros(3), price=price)
        got["loss"].backward()
        return got["slopes"].means() * got["tokens"].sum()

    slopes = left_over(torch.zeros(3))
    assert slopes.abs().min() > 1e-3
    torch.testing.assert_close(left_over(-slopes), torch.zeros(3), rtol=0, atol=1e-5)


def test_steering_counts_what_the_thresholds_skip(batch):
    config = tiny_config(gate="straight_through", router_bias=True)
    model = tiny_model(config).train()
    model.freeze_base()
    plain = RoutingObjective(model)(**batch, weights=Weights())["skipped"][:, 0]
    model.explore_skips(0.5)
    explored = RoutingObjective(model)(**batch, weights=Weights())["skipped"][:, 0]
    assert torch.equal(plain, explored)  # of the first routed layer, whose input is the same


def test_half_the_slope_is_what_skipping_costs_near_the_base_model(batch):
    """One token of the last layer skips: half of dKL/dw against the KL itself."""
    config = tiny_config(gate="straight_through", router_bias=True, routing_layers=[3])
    model = tiny_model(config).train()
    model.freeze_base()
    with torch.no_grad():
        model.model.layers[3].router.head.bias.fill_(40.0)
        # An adapter that nearly is the layer, so that second order is all there is.
        layer = model.model.layers[3]
        layer.mlp.down_proj.weight.mul_(0.01)
        layer.self_attn.o_proj.weight.mul_(0.01)
        layer.adapter.down_proj.weight.zero_()
    model.explore_skips(0.2)
    seen = {}

    def keep(_, __, output):
        if output[1].requires_grad:
            output[1].retain_grad()
            seen.update(gates=output[1], run=output[2])

    layer.register_forward_hook(keep)
    got = RoutingObjective(model)(**batch, weights=Weights(lm=0.0, kl=1.0))
    got["loss"].backward()
    slopes = seen["gates"].grad[~seen["run"]]
    estimate = -slopes.sum() / 4  # explored gates count four times
    torch.testing.assert_close(estimate, got["kl"] / got["labels"], rtol=0.1, atol=0)
