from __future__ import annotations

import pytest
import torch

from flexidepth_ext import _C, ops
from flexidepth_ext.errors import ShapeError, ValueOutOfRangeError

from ..tolerances import assert_as_exact_as_torch
from .conftest import ROUNDING_ISAS

SHAPES = [(1, 1), (16, 64), (17, 33), (36, 576), (960, 576), (50, 1537)]


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 8, 13, 64, 200])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_torch(ctx, rows, n, k, dtype):
    torch.manual_seed(n + k + rows)
    x, w, b = torch.randn(rows, k), torch.randn(n, k).to(dtype), torch.randn(n)
    exact = torch.nn.functional.linear(x.double(), w.double(), b.double())
    same_type = torch.nn.functional.linear(x.to(dtype), w, b.to(dtype))
    assert_as_exact_as_torch(
        ops.linear(x, ops.PackedWeight(w, dtype), b, ctx=ctx), same_type, exact
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_never_depends_on_its_company(isa, dtype):
    x, w = torch.randn(40, 700), ops.PackedWeight(torch.randn(53, 700), dtype)
    alone = torch.cat(
        [ops.linear(x[i : i + 1].contiguous(), w, ctx=ops.context(1, isa)) for i in range(40)]
    )
    for rows in (1, 2, 6, 7, 12, 13, 40):
        for threads in (1, 2, 5):
            assert torch.equal(
                ops.linear(x[:rows].contiguous(), w, ctx=ops.context(threads, isa)), alone[:rows]
            )


def test_avx2_and_avx512_give_the_same_bits():
    isas = [isa for isa in ("avx2", "avx512") if isa in _C.available_isas()]
    x, w = torch.randn(9, 321), ops.PackedWeight(torch.randn(70, 321), torch.bfloat16)
    results = [ops.linear(x, w, ctx=ops.context(2, isa)) for isa in isas]
    assert all(torch.equal(results[0], other) for other in results)


def test_accumulates_scaled_rows_and_leaves_the_others(ctx):
    x, w, b = torch.randn(10, 48), torch.randn(37, 48), torch.randn(37)
    index, scale = torch.tensor([1, 4, 9], dtype=torch.int32), torch.tensor([0.5, 2.0, -1.0])
    start = torch.randn(10, 37)
    out = ops.linear(
        x, ops.PackedWeight(w), b, index=index, out=start.clone(), scale=scale, ctx=ctx
    )
    rows = index.long()
    wanted = start.clone()
    wanted[rows] += scale[:, None] * torch.nn.functional.linear(x[rows], w, b)
    torch.testing.assert_close(out[rows], wanted[rows])
    others = [i for i in range(10) if i not in rows.tolist()]
    assert torch.equal(out[others], start[others])


@pytest.fixture(params=ROUNDING_ISAS)
def rounding(request):
    if request.param not in _C.available_isas():
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.mark.parametrize("k", [1, 31, 33, 576, 1537, 2080])
def test_linear_bf16_rounded(rounding, k):
    x, w = torch.randn(14, k), torch.randn(50, k).bfloat16()
    ours = ops.linear(x, ops.PackedWeight(w, torch.bfloat16), ctx=ops.context(2, rounding))
    rounded = torch.nn.functional.linear(x.bfloat16().double(), w.double())
    # Against rounded activations only float32 summation is left; against exact ones the rounding shows.
    assert (ours.double() - rounded).abs().max() < 2e-6 * k**0.5 * 4
    assert_as_exact_as_torch(
        ours,
        torch.nn.functional.linear(x.bfloat16(), w),
        torch.nn.functional.linear(x.double(), w.double()),
    )


@pytest.mark.parametrize("k", [31, 576, 1100])
def test_rounded_rows_do_not_depend_on_their_company(rounding, k):
    """One, a few and many rows, all of them or picked ones, one thread or three: the same bits."""
    x, w = torch.randn(600, k), ops.PackedWeight(torch.randn(83, k), torch.bfloat16)
    whole = ops.linear(x, w, ctx=ops.context(3, rounding))
    for rows in ([0], [5, 599], list(range(13)), list(range(250, 270)), list(range(0, 600, 2))):
        ctx = ops.context(1, rounding)
        assert torch.equal(ops.linear(x[rows].contiguous(), w, ctx=ctx), whole[rows])
        index = torch.tensor(rows, dtype=torch.int32)
        assert torch.equal(ops.linear(x, w, index=index, ctx=ctx), whole[rows])


def test_what_stands_beside_the_last_input_does_not_count(rounding):
    x, k = torch.randn(3, 31), 31
    w = ops.PackedWeight(torch.randn(40, k), torch.bfloat16)
    ctx = ops.context(1, rounding)
    want = ops.linear(x, w, ctx=ctx)
    start, panels, steps = w.pointer - w.data.data_ptr(), 3, 16
    packed = w.data[start : start + panels * steps * 64].view(torch.bfloat16)
    packed.view(panels, steps, 16, 2)[:, -1, :, 1] = float("nan")
    assert torch.equal(ops.linear(x, w, ctx=ctx), want)


def test_inputs_of_an_earlier_call_are_forgotten(rounding):
    w = ops.PackedWeight(torch.randn(20, 64), torch.bfloat16)
    ctx, x = ops.context(1, rounding), torch.randn(4, 64)
    first = ops.linear(x, w, ctx=ctx)
    x.mul_(2)  # at the same address
    assert torch.equal(ops.linear(x, w, ctx=ctx), 2 * first)


def test_pack_keeps_every_float16_value():
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[torch.isfinite(values)]
    w = ops.PackedWeight(values[:, None])
    assert torch.equal(ops.linear(torch.ones(1, 1), w)[0], values.float())


def test_pack_rounds_to_bfloat16_as_torch():
    values = torch.randn(4096, 1) * torch.logspace(-30, 30, 4096)[:, None]
    packed = ops.linear(torch.ones(1, 1), ops.PackedWeight(values, torch.bfloat16))[0]
    assert torch.equal(packed, values[:, 0].bfloat16().float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_pack_refuses_values_that_are_not_finite(bad):
    w = torch.randn(20, 7)
    w[13, 3] = bad
    with pytest.raises(ValueOutOfRangeError, match="1 of 140 values"):
        ops.PackedWeight(w)


def test_wrong_shapes_name_what_came():
    w = ops.PackedWeight(torch.randn(4, 8))
    with pytest.raises(ShapeError, match=r"x is \[2, 7\]"):
        ops.linear(torch.randn(2, 7), w)
    with pytest.raises(ShapeError, match="not contiguous"):
        ops.linear(torch.randn(8, 2).T, w)
    with pytest.raises(ValueOutOfRangeError, match=r"0\.\.2 of 2 rows"):
        ops.linear(torch.randn(2, 8), w, index=torch.tensor([0, 2], dtype=torch.int32))
