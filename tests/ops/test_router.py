from __future__ import annotations

import pytest
import torch

from flexidepth import reference
from flexidepth_ext import ops
from flexidepth_ext.errors import ShapeError, ValueOutOfRangeError

from ..tolerances import assert_as_exact_as_torch


def router(hidden=96, router_dim=36, seed=0):
    torch.manual_seed(seed)
    return {
        "enc": torch.randn(router_dim, hidden) / hidden**0.5,
        "norm": torch.rand(router_dim) + 0.5,
        "dec": torch.randn(hidden, router_dim) / router_dim**0.5,
        "head": torch.randn(1, hidden) / hidden**0.5,
        "bias": torch.tensor([0.3]),
    }


def gates(x, r, order, fold, ctx):
    kwargs = (
        {"folded": ops.fold_router(r["dec"], r["head"])}
        if fold
        else {"dec": ops.PackedWeight(r["dec"]), "head": r["head"].reshape(-1).contiguous()}
    )
    return ops.router_gate(
        x,
        ops.PackedWeight(r["enc"]),
        r["norm"],
        bias=float(r["bias"]),
        eps=1e-5,
        order=order,
        ctx=ctx,
        **kwargs,
    )


@pytest.mark.parametrize("order", ["norm_tanh", "tanh_norm"])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_gate(ctx, order, fold, rows):
    r = router()
    x = torch.randn(rows, 96)
    wide = {k: v.double() for k, v in r.items()}
    exact = reference.router_gate(x.double(), **wide, eps=1e-5, order=order)
    same = reference.router_gate(x, **r, eps=1e-5, order=order, fold=fold)
    # The vectorised tanh is good to 2e-7 absolute, torch's to half a unit: allow that difference.
    assert_as_exact_as_torch(gates(x, r, order, fold, ctx), same, exact, factor=4.0)


def test_the_orders_differ():
    r, x = router(), torch.randn(20, 96)
    a, b = (gates(x, r, order, True, None) for order in ("norm_tanh", "tanh_norm"))
    assert (a - b).abs().max() > 1e-3


def test_gate_bits_do_not_depend_on_rows_or_threads(isa):
    r, x = router(), torch.randn(150, 96)
    alone = torch.cat(
        [gates(row[None].contiguous(), r, "norm_tanh", True, ops.context(1, isa)) for row in x]
    )
    for threads in (1, 2, 4):
        assert torch.equal(gates(x, r, "norm_tanh", True, ops.context(threads, isa)), alone)


def test_extreme_activations_saturate():
    r = router()
    r["head"] = r["head"] * 1e4
    w = gates(torch.randn(50, 96) * 1e6, r, "norm_tanh", True, None)
    assert (
        torch.isfinite(w).all()
        and ((w == 0) | (w == 1)).any()
        and (w >= 0).all()
        and (w <= 1).all()
    )


def test_fold_is_float64_rounded_once():
    r = router(hidden=4096)
    exact = (r["head"].double() @ r["dec"].double()).reshape(-1)
    assert torch.equal(ops.fold_router(r["dec"], r["head"]), exact.float())


def test_either_folded_or_strict():
    r = router()
    with pytest.raises(ShapeError, match="either folded, or dec and head"):
        ops.router_gate(torch.randn(1, 96), ops.PackedWeight(r["enc"]), r["norm"])


def test_a_router_of_other_sizes_is_refused():
    x, enc, norm = torch.randn(1, 96), ops.PackedWeight(torch.randn(6, 96)), torch.ones(6)
    dec, head = ops.PackedWeight(torch.randn(95, 6)), torch.randn(96)
    with pytest.raises(ShapeError, match=r"dec is \[95, 6\]; wanted \[96, 6\]"):
        ops.router_gate(x, enc, norm, dec=dec, head=head)
    with pytest.raises(ShapeError, match=r"head is \[5\]"):
        ops.router_gate(x, enc, norm, dec=dec, head=torch.randn(5))
    with pytest.raises(ShapeError, match=r"folded is \[5\]"):
        ops.router_gate(x, enc, norm, folded=torch.randn(5))


@pytest.mark.parametrize("rows", [0, 1, 7, 4096])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_compact_is_exact(rows, threshold):
    w = torch.rand(rows)
    w[::3] = threshold  # equality must skip
    ran, run_index, skip_index, run_scale, skip_scale = ops.compact(w, threshold)
    run = reference.decide(w, threshold)
    wanted_run, wanted_skip = reference.compact(run)
    assert torch.equal(ran.bool(), run)
    assert torch.equal(run_index, wanted_run) and torch.equal(skip_index, wanted_skip)
    assert torch.equal(run_scale, w[run]) and torch.equal(skip_scale, 1 - w[~run])


def test_compact_obeys_a_mask_and_unit_scales():
    w, forced = torch.rand(50), torch.randint(0, 2, (50,), dtype=torch.uint8)
    ran, run_index, _, run_scale, skip_scale = ops.compact(w, 0.5, forced=forced, unit_scales=True)
    assert torch.equal(ran, forced)
    assert torch.equal(run_index, forced.nonzero().flatten().int())
    assert (
        (run_scale == 1).all()
        and (skip_scale == 1).all()
        and len(run_scale) + len(skip_scale) == 50
    )


def test_compact_skips_on_a_nan_gate_and_refuses_a_bad_threshold():
    assert ops.compact(torch.tensor([float("nan")]), 0.5)[0].item() == 0
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueOutOfRangeError, match="lies in"):
            ops.compact(torch.rand(2), tau)
