"""What prompts compute between a library's products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexidepth_ext.errors import DtypeError, ShapeError

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (5, 13), (70, 264)])
@pytest.mark.parametrize("dtype", HALVES)
def test_silu_and_mul_rounds_once(ops, dtype, shape, biased):
    torch.manual_seed(shape[0])
    gate, up = (torch.randn(shape).mul_(3).to(dtype) for _ in range(2))
    biases = [torch.randn(shape[1]) if biased else None for _ in range(2)]
    g, u = (
        t.double() if b is None else t.double() + b.double()
        for t, b in zip((gate, up), biases, strict=True)
    )
    got = ops.silu_and_mul(gate, up, *biases)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), F.silu(g) * u, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("width", [8, 40, 13, 1032])
@pytest.mark.parametrize("dtype", HALVES)
def test_residual_add(ops, dtype, width, listed):
    """Rows that are not listed stay as they are."""
    torch.manual_seed(width)
    h, rows = torch.randn(9, width), 5 if listed else 9
    index = torch.tensor([7, 0, 3, 8, 1], dtype=torch.int32) if listed else None
    y, bias, scale = torch.randn(rows, width).to(dtype), torch.randn(width), torch.randn(rows)
    for options in ({}, {"bias": bias}, {"scale": scale}, {"bias": bias, "scale": scale}):
        added = y.double() + (bias.double() if "bias" in options else 0)
        if "scale" in options:
            added *= scale.double()[:, None]
        want = h.double()
        taken = torch.arange(9) if index is None else index.long()
        want[taken] += added
        got = ops.residual_add(h.clone(), y, index=index, **options)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
        others = [i for i in range(9) if i not in taken.tolist()]
        assert torch.equal(got[others], h[others])


@pytest.mark.parametrize("dtype", HALVES)
def test_where_no_16_bytes_begin(ops, dtype):
    """The same values, one at a time."""
    half, whole = torch.randn(100).to(dtype), torch.randn(100)
    a, b = half[:48].view(2, 24), half[50:98].view(2, 24)
    odd = [half[1:49].clone(), torch.empty(49, dtype=dtype), torch.empty(49)]
    odd[1][1:], odd[2][1:] = a.flatten(), whole[:48]
    moved, h = odd[1][1:].view(2, 24), odd[2][1:].view(2, 24)
    want = ops.silu_and_mul(a.contiguous(), b.contiguous())
    for gate, up in ((moved, b), (b, moved)):
        assert torch.equal(
            ops.silu_and_mul(gate, up),
            want if gate is moved else ops.silu_and_mul(b.clone(), a.clone()),
        )
    want = ops.residual_add(whole[:48].view(2, 24).clone(), a.clone())
    assert torch.equal(ops.residual_add(h.clone(), moved), want)
    assert torch.equal(ops.residual_add(h, a.clone()), want)


def test_nothing_to_do(ops):
    nothing, h = torch.empty(0, 8, dtype=torch.bfloat16), torch.ones(2, 8)
    assert ops.silu_and_mul(nothing, nothing).shape == (0, 8)
    none = torch.empty(0, dtype=torch.int32)
    assert torch.equal(ops.residual_add(h.clone(), nothing, index=none), h)


def test_bad_arguments(ops):
    half, whole = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(2, 8)
    with pytest.raises(DtypeError, match=r"gate has dtype torch\.float32; wanted torch\.bfloat16"):
        ops.silu_and_mul(whole, whole)
    with pytest.raises(DtypeError, match=r"gate has dtype torch\.bfloat16, up torch\.float16"):
        ops.silu_and_mul(half, half.half())
    with pytest.raises(ShapeError, match=r"up is \[1, 8\]; wanted \[2, 8\]"):
        ops.silu_and_mul(half, half[:1])
    with pytest.raises(ShapeError, match=r"gate_bias is \[2\]; wanted \[8\]"):
        ops.silu_and_mul(half, half, torch.ones(2))
    with pytest.raises(DtypeError, match=r"y has dtype torch\.float32"):
        ops.residual_add(whole, whole)
    with pytest.raises(ShapeError, match=r"y is \[2, 8\]; wanted \[1, 8\]"):
        ops.residual_add(whole, half, index=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ShapeError, match=r"scale is \[1\]; wanted \[2\]"):
        ops.residual_add(whole, half, scale=torch.ones(1))
    with pytest.raises(DtypeError, match=r"h has dtype torch\.bfloat16; wanted torch\.float32"):
        ops.residual_add(half, half)
