from __future__ import annotations

import pytest
import torch

from flexidepth import reference
from flexidepth_ext import ops
from flexidepth_ext.errors import ShapeError

from ..tolerances import assert_as_exact_as_torch

OPS = [ops.feed_forward, ops.adapter]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "d", "width"), [(1, 576, 1536), (1, 576, 96), (8, 48, 11), (100, 64, 176)]
)
def test_matches_torch(ctx, op, dtype, rows, d, width):
    torch.manual_seed(rows)
    weights = [
        torch.randn(*s).to(dtype) / s[1] ** 0.5 for s in ((width, d), (width, d), (d, width))
    ]
    y, h, scale = torch.randn(rows, d), torch.randn(rows, d), torch.rand(rows)
    exact = h.double() + scale.double()[:, None] * reference.gated_mlp(
        y.double(), *(w.double() for w in weights)
    )
    same = h.to(dtype) + scale.to(dtype)[:, None] * reference.gated_mlp(y.to(dtype), *weights)
    packed = [ops.PackedWeight(w, dtype) for w in weights]
    assert_as_exact_as_torch(op(y, h.clone(), *packed, scale=scale, ctx=ctx), same, exact)


@pytest.mark.parametrize("op", OPS)
def test_only_listed_rows_change(ctx, op):
    weights = [torch.randn(*s) for s in ((20, 32), (20, 32), (32, 20))]
    packed = [ops.PackedWeight(w) for w in weights]
    y, h = torch.randn(30, 32), torch.randn(30, 32)
    index = torch.tensor([0, 3, 29], dtype=torch.int32)
    got = op(y, h.clone(), *packed, index=index, ctx=ctx)
    others = [i for i in range(30) if i not in (0, 3, 29)]
    assert torch.equal(got[others], h[others])
    alone = op(y[3:4].contiguous(), h[3:4].clone(), *packed, ctx=ctx)
    assert torch.equal(got[3:4], alone)


def test_silu_at_the_ends(isa):
    y = torch.tensor([[-1e18, -100.0, -0.0, 100.0, 1e18]])
    identity = ops.PackedWeight(torch.eye(5))
    got = ops.feed_forward(
        y, torch.zeros(1, 5), identity, identity, identity, ctx=ops.context(1, isa)
    )
    torch.testing.assert_close(got, torch.nn.functional.silu(y) * y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
def test_lm_head(ctx, dtype, rows):
    h, norm, w = torch.randn(rows, 64), torch.rand(64), torch.randn(211, 64).to(dtype)
    exact = reference.lm_head(h.double(), norm.double(), w.double(), 1e-5)
    same = reference.lm_head(h.to(dtype), norm.to(dtype), w, 1e-5)
    assert_as_exact_as_torch(
        ops.lm_head(h, norm, ops.PackedWeight(w, dtype), 1e-5, ctx=ctx), same, exact
    )


def test_shapes_are_checked():
    a, b = ops.PackedWeight(torch.randn(20, 32)), ops.PackedWeight(torch.randn(32, 20))
    with pytest.raises(ShapeError, match=r"wanted \[w, d\], \[w, d\], \[d, w\]"):
        ops.feed_forward(torch.randn(1, 32), torch.randn(1, 32), a, b, b)
    with pytest.raises(ShapeError, match=r"h is \[2, 32\]"):
        ops.feed_forward(torch.randn(1, 32), torch.randn(2, 32), a, a, b)
