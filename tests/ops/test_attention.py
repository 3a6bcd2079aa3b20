from __future__ import annotations

import pytest
import torch

from flexidepth import reference
from flexidepth_ext import _C, ops
from flexidepth_ext.errors import ValueOutOfRangeError

from ..tolerances import assert_as_exact_as_torch

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """All of them: those that round activations before weights round none here."""
    return str(request.param)


def filled(dtype, tokens, kv_heads, dim, seed=0, ctx=None, layers=2):
    """A cache of `tokens` tokens and what it holds, as float32 [tokens, kv_heads, dim] after rounding."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(tokens, kv_heads * dim, generator=generator) for _ in range(2))
    cache = ops.new_cache(dtype, layers, kv_heads, dim, tokens + 300)
    ops.kv_append(cache, k, v, layer=1, ctx=ctx)
    shape = (tokens, kv_heads, dim)
    return cache, k.to(dtype).float().view(shape), v.to(dtype).float().view(shape)


def expected(q, k, v, positions, heads, window, dtype):
    """reference.attention over rows with their own positions."""
    tokens, _, dim = k.shape
    mask = reference.attention_mask(positions, torch.arange(tokens), window or None)
    per_head = q.view(len(q), heads, dim).transpose(0, 1).to(dtype)
    out = reference.attention(
        per_head, k.transpose(0, 1).to(dtype), v.transpose(0, 1).to(dtype), mask
    )
    return out.transpose(0, 1).reshape(len(q), -1)


def run(q, caches, positions, heads, window=0, sequences=None, ctx=None):
    sequences = torch.zeros(len(q), dtype=torch.int32) if sequences is None else sequences
    return ops.attention(
        q, caches, positions, sequences, heads, layer=1, sliding_window=window, ctx=ctx
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 16), (14, 2, 64), (1, 1, 80), (13, 1, 6)]
)
@pytest.mark.parametrize("tokens", [1, 15, 257, 700])
def test_one_query_at_the_end(ctx, dtype, heads, kv_heads, dim, tokens):
    cache, k, v = filled(dtype, tokens, kv_heads, dim, ctx=ctx)
    q, positions = torch.randn(1, heads * dim), torch.tensor([tokens - 1])
    exact = expected(q, k, v, positions, heads, 0, torch.float64)
    same = expected(q, k, v, positions, heads, 0, dtype)
    assert_as_exact_as_torch(run(q, [cache], positions, heads, ctx=ctx), same, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 100, 300])
def test_gathered_queries_see_their_own_past(ctx, dtype, window):
    cache, k, v = filled(dtype, 600, 2, 32, ctx=ctx)
    positions = torch.sort(torch.randperm(600)[:90]).values
    q = torch.randn(90, 4 * 32)
    exact = expected(q, k, v, positions, 4, window, torch.float64)
    same = expected(q, k, v, positions, 4, window, dtype)
    assert_as_exact_as_torch(run(q, [cache], positions, 4, window, ctx=ctx), same, exact)


@pytest.mark.parametrize("dim", [6, 64])
@pytest.mark.parametrize("rows", [1, 70])
def test_neither_queries_nor_weights_are_rounded_to_the_caches_type(ctx, rows, dim):
    """A hundredth of what rounding either of them to bfloat16 costs."""
    cache, k, v = filled(torch.bfloat16, 333, 2, dim, ctx=ctx)
    positions = torch.arange(333 - rows, 333)
    q = torch.randn(rows, 6 * dim)
    exact = expected(q, k, v, positions, 6, 0, torch.float64)
    error = (run(q, [cache], positions, 6, ctx=ctx) - exact).square().mean().sqrt()
    rounded = expected(q.bfloat16(), k, v, positions, 6, 0, torch.float64)
    assert error < 0.01 * (rounded - exact).square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_and_in_company_has_the_same_bits(isa, dtype):
    cache, _, _ = filled(dtype, 520, 3, 64)
    positions, q = torch.arange(520), torch.randn(520, 9 * 64)
    whole = run(q, [cache], positions, 9, ctx=ops.context(3, isa))
    for i in (0, 1, 255, 256, 257, 511, 519):
        alone = run(
            q[i : i + 1].contiguous(), [cache], positions[i : i + 1], 9, ctx=ops.context(1, isa)
        )
        assert torch.equal(alone[0], whole[i])


def test_rows_of_several_sequences(ctx):
    lengths, heads = [5, 300, 64], 6
    parts = [filled(torch.float32, n, 2, 16, seed=n, ctx=ctx) for n in lengths]
    positions = torch.tensor([4, 10, 299, 63])
    sequences = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    q = torch.randn(4, heads * 16)
    got = run(q, [c for c, _, _ in parts], positions, heads, sequences=sequences, ctx=ctx)
    for i, s in enumerate(sequences.tolist()):
        _, k, v = parts[s]
        want = expected(q[i : i + 1], k, v, positions[i : i + 1], heads, 0, torch.float32)
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_unused_slots_may_hold_anything(dtype, tokens):
    cache, _, _ = filled(dtype, tokens, 3, 64)
    q, positions = torch.randn(tokens, 9 * 64), torch.arange(tokens)
    before = run(q, [cache], positions, 9)
    cache.poison_unused()
    assert torch.equal(run(q, [cache], positions, 9), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_append_token_by_token_is_append_at_once(dtype):
    k, v = torch.randn(270, 2 * 16), torch.randn(270, 2 * 16)
    whole, single = (ops.new_cache(dtype, 2, 2, 16, 300) for _ in range(2))
    ops.kv_append(whole, k, v, layer=1)
    for i in range(270):
        ops.kv_append(single, k[i : i + 1].contiguous(), v[i : i + 1].contiguous(), layer=1)
    q, positions = torch.randn(270, 4 * 16), torch.arange(270)
    assert torch.equal(run(q, [whole], positions, 4), run(q, [single], positions, 4))


def test_cache_limits():
    cache = ops.new_cache(torch.float32, 1, 1, 4, 10)
    with pytest.raises(ValueOutOfRangeError, match="11 tokens do not fit"):
        ops.kv_append(cache, torch.randn(11, 4), torch.randn(11, 4))
    assert cache.length == 0
    ops.kv_append(cache, torch.randn(10, 4), torch.randn(10, 4))
    with pytest.raises(ValueOutOfRangeError, match="position 10 of sequence 0"):
        run_position = torch.tensor([10])
        ops.attention(
            torch.randn(1, 4), [cache], run_position, torch.zeros(1, dtype=torch.int32), 1
        )
    with pytest.raises(ValueOutOfRangeError, match="truncate to 11"):
        cache.truncate(11)
