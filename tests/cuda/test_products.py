"""Linear layers, feed-forward, adapter and LM head, by matrix-vector products and on (emulated) tensor cores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexidepth import reference
from flexidepth_ext.errors import DtypeError, ShapeError

from ..tolerances import assert_as_exact_as_torch
from .conftest import DTYPES

# Odd sizes, and rows that are no multiple of 16 bytes.
ROWS = [1, 2, 3, 5, 8, 9, 16, 33, 64]
CASES = [(rows, n, k) for n, k in [(1, 8), (17, 33), (36, 64), (50, 96)] for rows in ROWS]
# More inputs than are in shared memory at a time.
CASES += [(1, 9, 8200), (4, 9, 2100), (5, 9, 1056), (9, 24, 1056)]


@pytest.mark.parametrize(("rows", "n", "k"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_matches_torch(ops, rows, n, k, dtype):
    torch.manual_seed(n + k + rows)
    x, w, b = torch.randn(rows, k), torch.randn(n, k).to(dtype), torch.randn(n)
    exact = F.linear(x.double(), w.double(), b.double())
    same_type = F.linear(x.to(dtype), w, b.to(dtype))
    assert_as_exact_as_torch(ops.linear(x, w, b), same_type, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_company(ops, dtype):
    """Within decoding (up to 8 rows) and within prompts (beyond)."""
    x, w = torch.randn(64, 96), torch.randn(40, 96).to(dtype)
    alone = torch.cat([ops.linear(x[i : i + 1].contiguous(), w) for i in range(8)])
    for rows in (2, 3, 5, 8):
        assert torch.equal(ops.linear(x[:rows].contiguous(), w), alone[:rows])
    whole = ops.linear(x, w)
    for begin, end in ((0, 9), (3, 40), (31, 64)):
        assert torch.equal(ops.linear(x[begin:end].contiguous(), w), whole[begin:end])


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_accumulates_listed_rows_and_leaves_the_others(ops, rows, dtype):
    x, w = torch.randn(30, 64), torch.randn(33, 64).to(dtype)
    index = torch.randperm(30)[:rows].int()
    scale, start = torch.randn(rows), torch.randn(30, 33)
    live = torch.tensor([rows - 1], dtype=torch.int32)
    out = ops.linear(x, w, index=index, live=live, out=start.clone(), scale=scale)
    taken = index[:-1].long()
    wanted = start.clone()
    # Tensor cores take the inputs in the weights' type.
    given = x[taken].to(dtype).float() if rows > 8 else x[taken]
    wanted[taken] += scale[:-1, None] * F.linear(given, w.float())
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-4)
    others = [i for i in range(30) if i not in taken.tolist()]
    assert torch.equal(out[others], start[others])


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("k", [96, 2112])
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_rows_begin_does_not_matter(ops, rows, k, dtype):
    """16 bytes are loaded at a time where they can be; norms of more inputs than are loaded together."""
    torch.manual_seed(k + rows)
    h, w = torch.randn(rows, k), torch.randn(20, k).to(dtype)
    norm = torch.rand(k) + 0.5
    logits, best = ops.lm_head(h, norm, w, 1e-5)
    y = reference.rms_norm(h.double(), norm.double(), 1e-5)
    assert_as_exact_as_torch(logits, F.linear(y.to(dtype), w), F.linear(y, w.double()))
    elsewhere = torch.empty(1 + rows * k)[1:].view(rows, k).copy_(h)
    again, same = ops.lm_head(elsewhere, norm, w, 1e-5)
    tolerance = 1e-2 if rows > 8 else 1e-5
    torch.testing.assert_close(again, logits, rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(best, same)
    plain = ops.linear(h, w)  # without a norm, whose sum has another order
    assert torch.equal(ops.linear(elsewhere, w), plain)


def test_no_live_row_means_nothing_is_written(ops):
    x, w = torch.randn(9, 32), torch.randn(5, 32).bfloat16()
    start, none = torch.randn(9, 5), torch.zeros(1, dtype=torch.int32)
    for rows in (1, 9):
        index = torch.arange(rows, dtype=torch.int32)
        assert torch.equal(ops.linear(x, w, index=index, live=none, out=start.clone()), start)


@pytest.mark.parametrize("name", ["feed_forward", "adapter"])
@pytest.mark.parametrize("rows", [1, 4, 8, 20])
@pytest.mark.parametrize("width", [24, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_mlp(ops, name, rows, width, dtype):
    torch.manual_seed(rows + width)
    d = 64
    h, norm = torch.randn(rows + 2, d), torch.rand(d) + 0.5
    gate, up = (torch.randn(width, d).to(dtype) / 8 for _ in range(2))
    down = torch.randn(d, width).to(dtype) / 8
    index, scale = torch.randperm(rows + 2)[:rows].int(), torch.rand(rows)
    taken = index.long()

    def wanted(kind: torch.dtype) -> torch.Tensor:
        y = reference.rms_norm(h[taken].double(), norm.double(), 1e-5).to(kind)
        inner = F.silu(F.linear(y, gate.to(kind))) * F.linear(y, up.to(kind))
        return h[taken].to(kind) + scale[:, None].to(kind) * F.linear(inner, down.to(kind))

    out = getattr(ops, name)(
        h, h.clone(), gate, up, down, index=index, scale=scale, norm=norm, eps=1e-5
    )
    assert_as_exact_as_torch(out[taken], wanted(dtype), wanted(torch.float64))
    others = [i for i in range(rows + 2) if i not in taken.tolist()]
    assert torch.equal(out[others], h[others])
    # Normed before, it is the same.
    y = ops.rms_norm(h, norm, 1e-5)
    again = getattr(ops, name)(y, h.clone(), gate, up, down, index=index, scale=scale)
    torch.testing.assert_close(
        again, out, rtol=1e-2 if rows > 8 else 1e-5, atol=1e-2 if rows > 8 else 1e-5
    )


@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lm_head_and_its_best_token(ops, rows, dtype):
    torch.manual_seed(rows)
    h, norm, w = torch.randn(rows + 1, 64), torch.rand(64), torch.randn(203, 64).to(dtype)
    index = torch.randperm(rows + 1)[:rows].int()
    logits, best = ops.lm_head(h, norm, w, 1e-5, index=index)
    y = reference.rms_norm(h[index.long()].double(), norm.double(), 1e-5)
    assert_as_exact_as_torch(logits, F.linear(y.to(dtype), w), F.linear(y, w.double()))
    assert best.tolist() == logits.argmax(1).tolist()
    assert torch.equal(ops.logits(h, norm, w, 1e-5, index=index), logits)


def test_the_best_of_equal_logits_is_the_first_and_negative_ones_count_too(ops):
    w = torch.zeros(40, 8)
    w[:, 0] = -1.0
    w[7, 0] = w[31, 0] = -0.5
    logits, best = ops.lm_head(torch.eye(1, 8), torch.ones(8), w, 1e-5)
    assert (logits < 0).all() and best.tolist() == [7]


def test_what_the_keys_of_the_best_held_before_does_not_matter(ops):
    h, w, norm = torch.randn(1, 8), torch.randn(20, 8), torch.ones(8)
    logits, best = torch.empty(1, 20), torch.full((1,), -1)  # the largest key there is
    module = ops.module
    module.lm_head(
        0,
        module.Rows(h.data_ptr(), 1, 8),
        norm.data_ptr(),
        1e-5,
        module.Matrix(w.data_ptr(), 0, 20, 8),
        logits.data_ptr(),
        best.data_ptr(),
    )
    assert (~best & 0xFFFFFFFF).tolist() == logits.argmax(1).tolist()


def test_wrong_tensors_are_named(ops):
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    with pytest.raises(DtypeError, match=r"x has dtype torch\.float64; wanted torch\.float32"):
        ops.linear(x.double(), w)
    with pytest.raises(DtypeError, match=r"weight has dtype torch\.int32"):
        ops.linear(x, w.int())
    with pytest.raises(ShapeError, match=r"x is \[2, 8\]; wanted \[rows, 6\]"):
        ops.linear(x, w[:, :6].contiguous())
    with pytest.raises(ShapeError, match=r"weight .* is not contiguous"):
        ops.linear(x, torch.randn(8, 4).T)
    with pytest.raises(ShapeError, match="weight begins 4 bytes behind a multiple of 16"):
        ops.linear(x, torch.randn(33)[1:].view(4, 8))
    with pytest.raises(DtypeError, match="a tensor is on meta; wanted"):
        ops.linear(x.to("meta"), w)
    with pytest.raises(DtypeError, match="weight is on meta, other tensors are on"):
        ops.linear(x, w.to("meta"))
    with pytest.raises(DtypeError, match=r"x's index has dtype torch\.int64"):
        ops.linear(x, w, index=torch.tensor([0]))
    with pytest.raises(ShapeError, match=r"weight's bias is \[3\]; wanted \[4\]"):
        ops.linear(x, w, torch.randn(3))
    with pytest.raises(ShapeError, match=r"wanted \[w, d\], \[w, d\], \[d, w\]"):
        ops.adapter(x, x.clone(), w, w, w)
