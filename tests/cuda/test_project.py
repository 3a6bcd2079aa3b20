"""The fused phase in front of attention: norm, projections, rotation, cache."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext import ops as cpu_ops
from flexidepth_ext.cuda_ops import PagedCache
from flexidepth_ext.errors import DtypeError, ShapeError

from .conftest import DTYPES, on_cpu

D, HEADS, KV, DIM = 64, 3, 1, 16
EPS = 1e-5


class Layer:
    """Weights, rows and rotation of one layer; everything else of the test follows from the separate ops."""

    def __init__(self, dtype, rows, seed=0):
        torch.manual_seed(seed)
        self.h, self.norm = torch.randn(rows, D), torch.rand(D) + 0.5
        self.q, self.k, self.v, self.enc = (
            (torch.randn(n, D) / 8).to(dtype) for n in (HEADS * DIM, KV * DIM, KV * DIM, 12)
        )
        self.q_bias, self.k_bias, self.v_bias = (
            torch.randn(len(w)) for w in (self.q, self.k, self.v)
        )
        self.positions = torch.randperm(400)[:rows]
        self.sequences = torch.randint(0, 2, (rows,), dtype=torch.int32)
        self.inv_freq = 1.0 / 10000 ** (torch.arange(0, DIM, 2) / DIM)

    def cache(self, ops, dtype):
        return PagedCache(ops, dtype, 2, KV, DIM, 400, 2, device=ops.device_type)


def close(got, want, dtype, rows):
    """Tensor cores round the normed input to the weights' type, the separate norm does not."""
    loose = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    tolerance = loose if rows > 8 else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def cached(cache):
    """The cache's values of layer 1 [sequence, page, elements]."""
    half = cache.pages.shape[-1] // 2
    return cache.pages[..., half:].contiguous().view(cache.dtype).float()


@pytest.mark.parametrize("rows", [1, 4, 7, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_a_plain_layer(ops, rows, dtype, cache_dtype):
    layer = Layer(dtype, rows)
    table = ops.rope_table(layer.positions, layer.inv_freq)
    fused, separate = (layer.cache(ops, cache_dtype) for _ in range(2))
    q = ops.project(
        layer.h,
        layer.norm,
        EPS,
        table=table,
        first=layer.q,
        first_bias=layer.q_bias,
        rotate_first=True,
        k=layer.k,
        k_bias=layer.k_bias,
        v=layer.v,
        v_bias=layer.v_bias,
        cache=fused,
        layer=1,
        positions=layer.positions,
        sequences=layer.sequences,
    )
    x = ops.rms_norm(layer.h, layer.norm, EPS)
    close(q, ops.rope(ops.linear(x, layer.q, layer.q_bias), table), dtype, rows)
    ops.kv_append(
        separate,
        ops.rope(ops.linear(x, layer.k, layer.k_bias), table),
        ops.linear(x, layer.v, layer.v_bias),
        layer.positions,
        layer.sequences,
        layer=1,
    )
    rounded = cache_dtype if cache_dtype == torch.bfloat16 else dtype
    got, want = cached(fused), cached(separate)
    if rounded != torch.bfloat16:
        close(got, want, torch.float16 if cache_dtype == torch.float16 else dtype, 9)
    else:
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)
    assert (want != 0).sum() == rows * 2 * KV * DIM
    assert torch.equal(got != 0, want != 0)
    assert not fused.pages[..., : fused.pages.shape[-1] // 2].any()  # the other layer


@pytest.mark.parametrize("rows", [1, 3, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_router_of_its_own_type(ops, rows, dtype):
    """Its codes and the cache have the bits that calls of one type each give."""
    layer = Layer(dtype, rows)
    code = torch.randn(12, D) / 8
    table = ops.rope_table(layer.positions, layer.inv_freq)
    together, apart = (layer.cache(ops, dtype) for _ in range(2))

    def project(cache=None, **matrices):
        places = {} if cache is None else {"positions": layer.positions, "layer": 1}
        if cache is not None:
            places["sequences"] = layer.sequences
        return ops.project(layer.h, layer.norm, EPS, table=table, cache=cache, **matrices, **places)

    encoded = project(together, first=code, k=layer.k, v=layer.v)
    assert torch.equal(encoded, project(first=code))
    project(apart, k=layer.k, v=layer.v)
    assert torch.equal(cached(together), cached(apart))
    with pytest.raises(DtypeError, match=r"wanted one type \(but the router's"):
        project(together, first=code.double(), k=layer.k, v=layer.v)


@pytest.mark.parametrize("rows", [2, 12])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_routed_layer_in_two_calls(ops, rows, dtype):
    """Codes, keys and values of all rows, then the queries of listed ones."""
    layer = Layer(dtype, rows)
    table, cache = ops.rope_table(layer.positions, layer.inv_freq), layer.cache(ops, torch.float32)
    encoded = ops.project(
        layer.h,
        layer.norm,
        EPS,
        table=table,
        first=layer.enc,
        k=layer.k,
        v=layer.v,
        cache=cache,
        positions=layer.positions,
        sequences=layer.sequences,
    )
    x = ops.rms_norm(layer.h, layer.norm, EPS)
    close(encoded, ops.linear(x, layer.enc), dtype, rows)
    index = torch.arange(rows - 1, 0, -1, dtype=torch.int32)
    live = torch.tensor([rows - 1], dtype=torch.int32)
    q = ops.project(
        layer.h,
        layer.norm,
        EPS,
        table=table,
        first=layer.q,
        rotate_first=True,
        index=index,
        live=live,
    )
    taken = index.long()
    wanted = ops.rope(ops.linear(x, layer.q)[taken].contiguous(), table[taken].contiguous())
    close(q, wanted, dtype, rows)


def test_what_cannot_be_projected(ops):
    layer = Layer(torch.float32, 9)
    table = ops.rope_table(layer.positions, layer.inv_freq)
    with pytest.raises(ShapeError, match="give first, or k, v and their cache"):
        ops.project(layer.h, layer.norm, EPS, table=table, first=layer.q, k=layer.k)
    with pytest.raises(DtypeError, match=r"matrices of torch.float32, torch.bfloat16"):
        ops.project(
            layer.h,
            layer.norm,
            EPS,
            table=table,
            k=layer.k,
            v=layer.v.bfloat16(),
            cache=layer.cache(ops, torch.float32),
        )
    with pytest.raises(ShapeError, match=r"wanted \[n, 64\]"):
        ops.project(layer.h, layer.norm, EPS, table=table, first=torch.randn(4, 60))


def test_the_cpu_computes_the_same_layer(ops):
    layer = Layer(torch.float32, 3)
    table = ops.rope_table(layer.positions, layer.inv_freq)
    q = ops.project(
        layer.h,
        layer.norm,
        EPS,
        table=table,
        first=layer.q,
        first_bias=layer.q_bias,
        rotate_first=True,
    )

    def on_the_cpu(h, norm, weight, bias, positions, inv_freq):
        x = cpu_ops.rms_norm(h, norm, EPS)
        y = cpu_ops.linear(x, cpu_ops.PackedWeight(weight), bias)
        return cpu_ops.rope(y, positions, inv_freq, DIM)

    wanted = on_cpu(
        on_the_cpu, layer.h, layer.norm, layer.q, layer.q_bias, layer.positions, layer.inv_freq
    )
    torch.testing.assert_close(q, wanted, rtol=1e-5, atol=1e-5)
