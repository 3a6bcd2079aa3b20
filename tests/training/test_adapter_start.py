"""Adapters fitted in closed form, against the choice made the long way and where the answer is known."""

from __future__ import annotations

import pytest
import torch

from flexidepth.training import adapter_start
from flexidepth.training.adapter_start import fit_adapters, select_columns
from flexidepth.training.objective import adapter_distances

from ..engine.conftest import tiny_config, tiny_model
from .test_objective import packed


@pytest.fixture
def batches():
    return [packed([[10, 9], [24], [5, 6, 7]]), packed([[20], [7, 7]])]


def mean_distance(model, batches):
    total = tokens = 0.0
    for batch in batches:
        inputs = {k: batch[k] for k in ("input_ids", "position_ids", "attention_mask")}
        mask = batch["document_ids"] >= 0
        total = total + adapter_distances(model, inputs, mask).detach()
        tokens += float(mask.sum())
    return total / tokens


def test_columns_are_chosen_by_what_they_explain():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    a[:, 5] = a[:, 4] + 0.3 * a[:, 5]  # worth little once the other is there
    targets = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    targets[:, 0] += 3 * a[:, 4] + a[:, 9]

    def unexplained(columns):
        fit = torch.linalg.lstsq(a[:, columns], targets).solution
        return float((targets - a[:, columns] @ fit).pow(2).sum())

    want: list[int] = []
    for _ in range(6):
        rest = [i for i in range(12) if i not in want]
        want.append(min(rest, key=lambda i: unexplained([*want, i])))
    chosen, weights = select_columns(a.T @ a, a.T @ targets, 6)
    assert chosen.tolist() == want
    best = torch.linalg.lstsq(a[:, chosen], targets).solution
    torch.testing.assert_close(weights, best, rtol=0.0, atol=0.01)


def test_an_adapter_as_wide_as_its_layer_is_the_layer(batches):
    model = tiny_model(tiny_config(adapter_reduction_factor=1))
    with torch.no_grad():
        for layer in model.routed_layers():
            layer.self_attn.o_proj.weight.zero_()
    assert mean_distance(model, batches).min() > 0.5
    fit_adapters(model, lambda: batches)
    # As close as the ridge allows.
    assert mean_distance(model, batches).max() < 0.01


def test_where_the_feed_forward_alone_is_skipped_the_adapter_is_fitted_to_it(batches):
    config = tiny_config(adapter_reduction_factor=1, ablations=["feed_forward_only"])
    model = tiny_model(config)
    fit_adapters(model, lambda: batches)
    assert mean_distance(model, batches).max() < 0.01
    ids = batches[0]["input_ids"][1:2]
    with torch.no_grad():
        skipped, base = model(ids, force_routing="none"), model(ids, force_routing="dense")
        before = tiny_model(config)(ids, force_routing="none")
    far = (before.logits - base.logits).norm()
    assert (skipped.logits - base.logits).norm() < 0.2 * far


@pytest.mark.parametrize("held_bytes", [1, 1 << 30])
def test_fitting_brings_every_adapter_closer(batches, monkeypatch, held_bytes):
    """However many layers are done at a time."""
    monkeypatch.setattr(adapter_start, "_HELD_BYTES", held_bytes)
    model = tiny_model(tiny_config(adapter_reduction_factor=2))
    before = mean_distance(model, batches)
    base = {n: p.clone() for n, p in model.named_parameters() if ".adapter." not in n}
    calls = []

    def every_time():
        calls.append(None)
        return iter(batches)

    fit_adapters(model, every_time)
    after = mean_distance(model, batches)
    assert (after < before).all() and (after < 0.9).all()
    assert len(calls) == (len(model.routed_layers()) if held_bytes == 1 else 1)
    for name, parameter in model.named_parameters():
        assert ".adapter." in name or torch.equal(parameter, base[name])


def test_padding_is_of_no_account(batches):
    other = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in batches]
    for batch in other:
        batch["input_ids"][batch["document_ids"] < 0] = 3
    assert any(
        not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other, strict=True)
    )
    fitted = []
    for own in (batches, other):
        model = tiny_model(tiny_config(adapter_reduction_factor=2))
        fit_adapters(model, lambda own=own: own)
        fitted.append([layer.adapter.down_proj.weight for layer in model.routed_layers()])
    for one, two in zip(*fitted, strict=True):
        torch.testing.assert_close(one, two)
