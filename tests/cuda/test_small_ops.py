"""Norm, rotation, embedding, gate and compaction."""

from __future__ import annotations

import pytest
import torch

from flexidepth import reference
from flexidepth_ext import ops as cpu_ops
from flexidepth_ext.cuda_ops import RouterWeights
from flexidepth_ext.errors import ShapeError, ValueOutOfRangeError

from ..tolerances import assert_as_exact_as_torch
from .conftest import DTYPES, on_cpu


@pytest.mark.parametrize("width", [1, 33, 576, 1000])
def test_rms_norm(ops, width):
    x, w = torch.randn(5, width), torch.randn(width)
    exact = reference.rms_norm(x.double(), w.double(), 1e-5)
    assert_as_exact_as_torch(ops.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5), exact)


@pytest.mark.parametrize("head_dim", [2, 64, 80, 128])
def test_rope_is_the_cpus(ops, head_dim):
    x = torch.randn(6, 3 * head_dim)
    positions = torch.tensor([0, 1, 17, 255, 4096, 131071])
    inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    table = ops.rope_table(positions, inv_freq)
    wanted = on_cpu(cpu_ops.rope, x, positions, inv_freq, head_dim)
    torch.testing.assert_close(ops.rope(x, table), wanted, rtol=1e-5, atol=1e-5)
    index = torch.tensor([4, 2, 0], dtype=torch.int32)
    some = ops.rope(x[index.long()].contiguous(), table, index=index)
    torch.testing.assert_close(some, wanted[index.long()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(ops, dtype):
    w, ids = torch.randn(20, 33).to(dtype), torch.tensor([3, 19, 0, 3], dtype=torch.int32)
    assert torch.equal(ops.embed(ids, w), w[ids.long()].float())


def router(dim: int, strict: bool, order: str) -> RouterWeights:
    norm, dec, head = torch.rand(dim) + 0.5, torch.randn(40, dim) / 4, torch.randn(40) / 4
    if strict:
        return RouterWeights(norm, dec=dec, head=head, bias=0.3, order=order)
    return RouterWeights(norm, folded=on_cpu(cpu_ops.fold_router, dec, head), bias=0.3, order=order)


def cpu_gates(x, enc, norm, folded, dec, head, bias, order):
    return cpu_ops.router_gate(
        x,
        cpu_ops.PackedWeight(enc),
        norm,
        folded=folded,
        dec=None if dec is None else cpu_ops.PackedWeight(dec),
        head=head,
        bias=bias,
        order=order,
    )


@pytest.mark.parametrize("rows", [1, 3, 9, 64])
@pytest.mark.parametrize("dim", [1, 36, 100])
@pytest.mark.parametrize("order", ["norm_tanh", "tanh_norm"])
@pytest.mark.parametrize("strict", [False, True])
def test_gates_are_the_cpus(ops, rows, dim, order, strict):
    torch.manual_seed(dim)
    x, enc, own = torch.randn(rows, 40), torch.randn(dim, 40) / 6, router(dim, strict, order)
    wanted = on_cpu(cpu_gates, x, enc, own.norm, own.folded, own.dec, own.head, own.bias, order)
    got = ops.router_gate(ops.linear(x, enc), own)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert rows < 64 or dim == 1 or got.std() > 0.01


@pytest.mark.parametrize("rows", [1, 2, 31, 64, 1023, 1024, 1025, 4096])
@pytest.mark.parametrize("unit_scales", [False, True])
def test_compaction_is_the_cpus(ops, rows, unit_scales):
    torch.manual_seed(rows)
    gates = torch.rand(rows)
    gates[rows // 2] = 0.5  # at the threshold: skipped
    for forced in (None, torch.randint(0, 2, (rows,), dtype=torch.uint8)):
        got = ops.compact(gates, 0.5, forced=forced, unit_scales=unit_scales)
        ran, run, skip, run_scale, skip_scale = on_cpu(
            cpu_ops.compact, gates, 0.5, forced=forced, unit_scales=unit_scales
        )
        assert got.counts.tolist() == [len(run), len(skip)]
        assert torch.equal(got.ran, ran)
        assert torch.equal(got.run_index[: len(run)], run)
        assert torch.equal(got.skip_index[: len(skip)], skip)
        assert torch.equal(got.run_scale[: len(run)], run_scale)
        assert torch.equal(got.skip_scale[: len(skip)], skip_scale)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_compaction_of_all_or_none_and_of_nan(ops, value):
    got = ops.compact(torch.full((40,), value), 0.5)
    assert got.counts.tolist() == ([40, 0] if value else [0, 40])
    assert ops.compact(torch.full((3,), float("nan")), 0.5).ran.tolist() == [0, 0, 0]


def test_bad_routers_and_thresholds(ops):
    code, norm = torch.randn(2, 4), torch.ones(4)
    with pytest.raises(ValueOutOfRangeError, match="order 'x'; wanted norm_tanh or tanh_norm"):
        ops.router_gate(code, RouterWeights(norm, folded=norm, order="x"))
    with pytest.raises(ShapeError, match="folded, or dec and head"):
        ops.router_gate(code, RouterWeights(norm, head=norm))
    with pytest.raises(ShapeError, match=r"dec is \[6, 5\]; wanted \[d, 4\]"):
        ops.router_gate(code, RouterWeights(norm, dec=torch.ones(6, 5), head=torch.ones(6)))
    with pytest.raises(ShapeError, match=r"head is \[5\]; wanted \[6\]"):
        ops.router_gate(code, RouterWeights(norm, dec=torch.ones(6, 4), head=torch.ones(5)))
    with pytest.raises(ValueOutOfRangeError, match=r"threshold is 1\.5"):
        ops.compact(torch.rand(3), 1.5)
