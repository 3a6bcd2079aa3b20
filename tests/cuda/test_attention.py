"""The cache and attention, against the plain reference."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext.cuda_ops import PagedCache
from flexidepth_ext.errors import DtypeError, ShapeError, UnsupportedError, ValueOutOfRangeError

from ..ops.test_attention import expected
from ..tolerances import assert_as_exact_as_torch
from .conftest import DTYPES


def filled(ops, dtype, lengths, kv_heads, dim, layers=2):
    """A cache of some sequences, layer 1 filled, and its contents after rounding [tokens, kv_heads, dim] each."""
    most = max(lengths)
    cache = PagedCache(
        ops, dtype, layers, kv_heads, dim, most + 300, len(lengths), device=ops.device_type
    )
    # Unused slots hold NaN in every type.
    cache.pages.fill_(255)
    parts = []
    for s, tokens in enumerate(lengths):
        k, v = torch.randn(tokens, kv_heads * dim), torch.randn(tokens, kv_heads * dim)
        sequences = torch.full((tokens,), s, dtype=torch.int32)
        ops.kv_append(cache, k, v, torch.arange(tokens), sequences, layer=1)
        parts.append([t.to(dtype).float().view(tokens, kv_heads, dim) for t in (k, v)])
    return cache, parts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(9, 3, 64), (4, 1, 80), (3, 3, 96), (14, 2, 128), (1, 1, 8), (5, 1, 16)],
)
@pytest.mark.parametrize("tokens", [1, 15, 257])
def test_one_query_at_the_end(ops, dtype, heads, kv_heads, dim, tokens):
    cache, ((k, v),) = filled(ops, dtype, [tokens], kv_heads, dim)
    q, position = torch.randn(1, heads * dim), torch.tensor([tokens - 1])
    got = ops.attention(q, cache, position, torch.zeros(1, dtype=torch.int32), heads, layer=1)
    exact = expected(q, k, v, position, heads, 0, torch.float64)
    assert_as_exact_as_torch(got, expected(q, k, v, position, heads, 0, dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 100, 300])
def test_gathered_queries_see_their_own_past(ops, dtype, window):
    """Running rows of a prompt: compacted queries, each with the position of the row it came from."""
    cache, ((k, v),) = filled(ops, dtype, [600], 2, 16)
    rows = torch.sort(torch.randperm(600)[:12]).values.int()
    q, live = torch.randn(12, 4 * 16), torch.tensor([11], dtype=torch.int32)
    positions, sequences = torch.arange(600), torch.zeros(600, dtype=torch.int32)
    got = ops.attention(
        q, cache, positions, sequences, 4, index=rows, live=live, layer=1, sliding_window=window
    )
    asked = positions[rows.long()]
    exact = expected(q, k, v, asked, 4, window, torch.float64)
    same = expected(q, k, v, asked, 4, window, dtype)
    assert_as_exact_as_torch(got[:11], same[:11], exact[:11])
    assert torch.equal(got[11], torch.zeros(64))  # no such row: left as it was


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 4200])
def test_long_contexts_are_split_by_their_own_length(ops, dtype, window):
    """Parts of 64, 128 and 256 tokens, for up to 16, 32 and more pages that a row sees, whatever others see."""
    cache, ((k, v),) = filled(ops, dtype, [8500], 1, 8)
    positions = torch.tensor([63, 64, 4095, 4096, 8191, 8192, 8499])
    sequences = torch.zeros(7, dtype=torch.int32)
    q = torch.randn(7, 2 * 8)
    got = ops.attention(q, cache, positions, sequences, 2, layer=1, sliding_window=window)
    exact = expected(q, k, v, positions, 2, window, torch.float64)
    assert_as_exact_as_torch(got, expected(q, k, v, positions, 2, window, dtype), exact)
    short, parts = PagedCache(ops, dtype, 1, 1, 8, 4096, 1, device=ops.device_type), [k, v]
    ops.kv_append(
        short,
        *(t[:4096].reshape(4096, 8) for t in parts),
        torch.arange(4096),
        torch.zeros(4096).int(),
    )
    own = slice(0, 3)
    alone = ops.attention(
        q[own].contiguous(), short, positions[own], sequences[own], 2, sliding_window=window
    )
    assert torch.equal(alone, got[own])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_several_sequences_and_alone_have_the_same_bits(ops, dtype):
    cache, parts = filled(ops, dtype, [5, 300, 64], 2, 16)
    positions = torch.tensor([4, 10, 299, 63])
    sequences = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    q = torch.randn(4, 6 * 16)
    whole = ops.attention(q, cache, positions, sequences, 6, layer=1)
    for i, s in enumerate(sequences.tolist()):
        own = slice(i, i + 1)
        alone = ops.attention(
            q[own].contiguous(), cache, positions[own], sequences[own], 6, layer=1
        )
        assert torch.equal(alone[0], whole[i])
        k, v = parts[s]
        want = expected(q[own], k, v, positions[own], 6, 0, torch.float32)
        torch.testing.assert_close(whole[own], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(3, 1, 64), (2, 2, 80), (2, 1, 96), (2, 1, 128), (2, 1, 8)]
)
@pytest.mark.parametrize("rows", [1, 63, 70])
def test_a_prompt(ops, dtype, heads, kv_heads, dim, rows):
    cache, ((k, v),) = filled(ops, dtype, [260], kv_heads, dim)
    q, positions = torch.randn(rows, heads * dim), torch.arange(260 - rows, 260)
    sequences = torch.zeros(rows, dtype=torch.int32)
    got = ops.attention(q, cache, positions, sequences, heads, layer=1, prompt=True)
    exact = expected(q, k, v, positions, heads, 0, torch.float64)
    assert_as_exact_as_torch(got, expected(q, k, v, positions, heads, 0, dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 100, 300])
def test_a_prompt_of_gathered_queries(ops, dtype, window):
    cache, ((k, v),) = filled(ops, dtype, [600], 1, 16)
    rows = torch.sort(torch.randperm(600)[:90]).values.int()
    q, live = torch.randn(90, 2 * 16), torch.tensor([80], dtype=torch.int32)
    positions, sequences = torch.arange(600), torch.zeros(600, dtype=torch.int32)
    got = ops.attention(
        q,
        cache,
        positions,
        sequences,
        2,
        index=rows,
        live=live,
        layer=1,
        sliding_window=window,
        prompt=True,
    )
    asked = positions[rows.long()]
    exact = expected(q, k, v, asked, 2, window, torch.float64)
    same = expected(q, k, v, asked, 2, window, dtype)
    assert_as_exact_as_torch(got[:80], same[:80], exact[:80])
    assert torch.equal(got[80:], torch.zeros(10, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_of_several_sequences_and_alone_have_the_same_bits(ops, dtype):
    cache, parts = filled(ops, dtype, [30, 70, 300], 1, 24)
    positions = torch.cat([torch.arange(30), torch.arange(70), torch.arange(290, 300)])
    sequences = torch.tensor([0] * 30 + [1] * 70 + [2] * 10, dtype=torch.int32)
    q = torch.randn(110, 2 * 24)
    whole = ops.attention(q, cache, positions, sequences, 2, layer=1, prompt=True)
    for s, (k, v) in enumerate(parts):
        own = sequences == s
        alone = ops.attention(
            q[own].contiguous(), cache, positions[own], sequences[own], 2, layer=1, prompt=True
        )
        assert torch.equal(alone, whole[own])
        exact = expected(q[own], k, v, positions[own], 2, 0, torch.float64)
        assert_as_exact_as_torch(
            whole[own], expected(q[own], k, v, positions[own], 2, 0, dtype), exact
        )


def test_counters_are_left_as_they_were(ops):
    """A second call with several pages would hang or read too early otherwise."""
    cache, _ = filled(ops, torch.float32, [520], 1, 8)
    q, position = torch.randn(1, 8), torch.tensor([519])
    first = torch.zeros(1, dtype=torch.int32)
    results = [ops.attention(q, cache, position, first, 1, layer=1) for _ in range(2)]
    assert torch.equal(*results)
    room = ops.attention_workspace(1, 1, cache)
    for _ in range(2):
        shared = ops.attention(q, cache, position, first, 1, layer=1, workspace=room)
        assert torch.equal(shared, results[0]) and not room.counters.any()
    with pytest.raises(ShapeError, match=r"the workspace has \d+ floats, 2 rows need \d+"):
        ops.attention(
            torch.randn(2, 8), cache, position.repeat(2), first.repeat(2), 1, workspace=room
        )
    module = ops.module
    counters, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 8)
    scratch = torch.empty(module.attention_scratch_floats(1, 1, 8, cache.max_pages))
    for _ in range(2):
        module.attention(
            0,
            cache.argument(ops, 1),
            module.Rows(q.data_ptr(), 1, 8),
            module.Rows(out.data_ptr(), 1, 8),
            position.data_ptr(),
            first.data_ptr(),
            0,
            0,
            8**-0.5,
            scratch.data_ptr(),
            cache.max_pages,
            counters.data_ptr(),
            False,
        )
        assert counters.item() == 0 and torch.equal(out, results[0])


def test_a_value_too_large_for_float16_harms_nobody_else(ops):
    """Row 0 does not see token 1; 0 times an infinity would be NaN where 64 rows share a tile of tokens."""
    cache = PagedCache(ops, torch.float16, 1, 1, 16, 10, device=ops.device_type)
    k, v = torch.randn(2, 16), torch.randn(2, 16)
    v[1] = torch.tensor([1e6, -1e6] * 8)
    sequences = torch.zeros(2, dtype=torch.int32)
    ops.kv_append(cache, k, v, torch.arange(2), sequences)
    q = torch.randn(2, 16)
    got = ops.attention(q, cache, torch.arange(2), sequences, 1, prompt=True)
    torch.testing.assert_close(got[0], v[0], rtol=2e-3, atol=2e-3)
    assert torch.isfinite(got).all()


def test_what_a_cache_cannot_be(ops):
    with pytest.raises(UnsupportedError, match="head_dim is 100; wanted a multiple of 8 up to 128"):
        PagedCache(ops, torch.float32, 1, 1, 100, 10, device=ops.device_type)
    with pytest.raises(UnsupportedError, match="head_dim is 256"):
        PagedCache(ops, torch.float32, 1, 1, 256, 10, device=ops.device_type)
    with pytest.raises(DtypeError, match=r"dtype torch\.int8"):
        PagedCache(ops, torch.int8, 1, 1, 8, 10, device=ops.device_type)
    cache, _ = filled(ops, torch.float32, [3], 2, 8)
    q, zero = torch.randn(1, 24), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ShapeError, match="3 heads for 2 KV heads"):
        ops.attention(q, cache, torch.zeros(1, dtype=torch.long), zero, 3)
    with pytest.raises(ValueOutOfRangeError, match="layer 2; there are 2"):
        ops.attention(torch.randn(1, 16), cache, torch.zeros(1, dtype=torch.long), zero, 2, layer=2)
    with pytest.raises(DtypeError, match=r"positions has dtype torch\.int32"):
        ops.attention(torch.randn(1, 16), cache, zero, zero, 2)
