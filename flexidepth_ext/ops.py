"""Each op of the engine on tensors, checked. For tests, benchmarks and experiments; a token's way through
the engine is one call and does not come here.

All activations are float32 and contiguous. Weights are packed once (`PackedWeight`) as float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from .errors import DtypeError, ShapeError, ValueOutOfRangeError

_DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ORDERS: dict[str, int] = {"norm_tanh": 0, "tanh_norm": 1}


@lru_cache(maxsize=8)
def context(num_threads: int | None = None, isa: str | None = None) -> _C.OpContext:
    """Threads and kernels; None = the processors available, the default instruction set."""
    return _C.OpContext(num_threads or _C.available_threads(), isa or "")


class PackedWeight:
    """A matrix [n, k] in panel layout.

    Args:
        weight: float32, bfloat16 or float16 [n, k].
        dtype: torch.float32 or torch.bfloat16 (rounded to nearest even).

    Raises:
        ValueOutOfRangeError: a value is NaN or infinite.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> None:
        if weight.dtype not in _DTYPES or dtype not in (torch.float32, torch.bfloat16):
            raise DtypeError(
                f"pack: {weight.dtype} to {dtype}; wanted float types, packed as float32 or bfloat16"
            )
        if weight.dim() != 2:
            raise ShapeError(f"pack: weight is {list(weight.shape)}; wanted a matrix [n, k]")
        source = weight.detach().contiguous()
        self.n, self.k = source.shape
        self.dtype = dtype
        self.code = _DTYPES[dtype]
        self.data = torch.zeros(_C.packed_bytes(self.code, self.n, self.k) + 64, dtype=torch.uint8)
        self.pointer = -(-self.data.data_ptr() // 64) * 64
        bad = _C.pack(
            context(),
            source.data_ptr(),
            _DTYPES[source.dtype],
            self.n,
            self.k,
            self.pointer,
            self.code,
        )
        if bad:
            raise ValueOutOfRangeError(
                f"pack: {bad} of {source.numel()} values are NaN or infinite"
            )


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    ctx: _C.OpContext | None = None,
) -> Tensor:
    """x W^T + b [rows, n]; with `out` [.., n] given, out[index] += scale * (x[index] W^T + b).

    Args:
        x: [rows, k]. index: int32 rows of x (and of out) to take; None = all.
        scale: float32 [rows taken].
    """
    rows = _f32(x, "linear", "x", (None, weight.k)) if index is None else _index(index, x, "linear")
    accumulate = out is not None
    result = torch.empty(rows, weight.n) if out is None else out
    _f32(result, "linear", "out", (None, weight.n))
    _C.linear(
        ctx or context(),
        x.data_ptr(),
        rows,
        _pointer(index),
        weight.pointer,
        weight.code,
        weight.n,
        weight.k,
        _pointer(bias),
        result.data_ptr(),
        _pointer(index) if accumulate else 0,
        accumulate,
        _pointer(scale),
    )
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, ctx: _C.OpContext | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [rows, width]."""
    rows = _f32(x, "rms_norm", "x", (None, None))
    _f32(weight, "rms_norm", "weight", (x.shape[1],))
    out = torch.empty_like(x)
    _C.rms_norm(
        ctx or context(), x.data_ptr(), out.data_ptr(), weight.data_ptr(), rows, x.shape[1], eps
    )
    return out


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    head_dim: int,
    *,
    ctx: _C.OpContext | None = None,
) -> Tensor:
    """Rotary embedding of x [rows, heads * head_dim] at positions int64 [rows]; returns a new tensor."""
    rows = _f32(x, "rope", "x", (None, None))
    if x.shape[1] % head_dim:
        raise ShapeError(f"rope: width {x.shape[1]} is not a multiple of head_dim {head_dim}")
    _typed(positions, torch.int64, "rope", "positions", (rows,))
    _f32(inv_freq, "rope", "inv_freq", (head_dim // 2,))
    out = x.clone()
    heads = x.shape[1] // head_dim
    _C.rope(
        ctx or context(),
        out.data_ptr(),
        positions.data_ptr(),
        inv_freq.data_ptr(),
        rows,
        heads,
        head_dim,
    )
    return out


def fold_router(dec: Tensor, head: Tensor) -> Tensor:
    """W_head W_dec [d_r] from dec [d, d_r] and head [1, d] or [d], summed in float64."""
    _f32(dec, "fold_router", "dec", (None, None))
    head = head.reshape(-1)
    _f32(head, "fold_router", "head", (dec.shape[0],))
    out = torch.empty(dec.shape[1])
    _C.fold_router(dec.data_ptr(), head.data_ptr(), dec.shape[0], dec.shape[1], out.data_ptr())
    return out


def router_gate(
    x: Tensor,
    enc: PackedWeight,
    norm: Tensor,
    *,
    folded: Tensor | None = None,
    dec: PackedWeight | None = None,
    head: Tensor | None = None,
    bias: float = 0.0,
    eps: float = 1e-5,
    order: str = "norm_tanh",
    ctx: _C.OpContext | None = None,
) -> Tensor:
    """Gate weights [rows] of x [rows, d]: folded (give `folded`) or strict (give `dec` and `head`).

    enc, dec: packed float32 [d_r, d] and [d, d_r]. norm: [d_r]. head: [d].
    """
    rows = _f32(x, "router_gate", "x", (None, enc.k))
    if enc.dtype != torch.float32 or (dec is not None and dec.dtype != torch.float32):
        raise DtypeError("router_gate: the router computes in float32; pack enc and dec as float32")
    if order not in _ORDERS:
        raise ValueOutOfRangeError(f"router_gate: order {order!r}; wanted {' or '.join(_ORDERS)}")
    if (folded is None) == (dec is None or head is None):
        raise ShapeError("router_gate: give either folded, or dec and head")
    _f32(norm, "router_gate", "norm", (enc.n,))
    if folded is not None:
        _f32(folded, "router_gate", "folded", (enc.n,))
    if dec is not None and head is not None:
        _f32(head, "router_gate", "head", (enc.k,))
        if (dec.n, dec.k) != (enc.k, enc.n):
            raise ShapeError(f"router_gate: dec is {[dec.n, dec.k]}; wanted {[enc.k, enc.n]}")
    gates = torch.empty(rows)
    _C.router_gate(
        ctx or context(),
        x.data_ptr(),
        rows,
        enc.k,
        enc.pointer,
        enc.n,
        norm.data_ptr(),
        _pointer(folded),
        0 if dec is None else dec.pointer,
        _pointer(head),
        bias,
        eps,
        _ORDERS[order],
        gates.data_ptr(),
    )
    return gates


def compact(
    gates: Tensor, threshold: float, *, forced: Tensor | None = None, unit_scales: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Threshold and compaction of gates float32 [rows].

    Returns ran uint8 [rows], run_index and skip_index int32, run_scale and skip_scale float32 in the same
    order. forced: uint8 [rows], decides instead of the gate. unit_scales: 1 and 1 instead of w and 1 - w.
    """
    rows = _f32(gates, "compact", "gates", (None,))
    if not 0.0 <= threshold <= 1.0:
        raise ValueOutOfRangeError(f"compact: threshold is {threshold}; it lies in [0, 1]")
    if forced is not None:
        _typed(forced, torch.uint8, "compact", "forced", (rows,))
    ran = torch.empty(rows, dtype=torch.uint8)
    run_index, skip_index = (
        torch.empty(rows, dtype=torch.int32),
        torch.empty(rows, dtype=torch.int32),
    )
    run_scale, skip_scale = torch.empty(rows), torch.empty(rows)
    run = _C.compact(
        gates.data_ptr(),
        _pointer(forced),
        threshold,
        unit_scales,
        rows,
        ran.data_ptr(),
        run_index.data_ptr(),
        skip_index.data_ptr(),
        run_scale.data_ptr(),
        skip_scale.data_ptr(),
    )
    return ran, run_index[:run], skip_index[: rows - run], run_scale[:run], skip_scale[: rows - run]


def new_cache(
    dtype: torch.dtype, num_layers: int, num_kv_heads: int, head_dim: int, max_length: int
) -> _C.KVCache:
    """A cache for `kv_append` and `attention`; dtype float32 or bfloat16."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise DtypeError(f"cache: dtype {dtype}; wanted torch.float32 or torch.bfloat16")
    return _C.KVCache(_DTYPES[dtype], num_layers, num_kv_heads, head_dim, max_length)


def kv_append(
    cache: _C.KVCache, k: Tensor, v: Tensor, *, layer: int = 0, ctx: _C.OpContext | None = None
) -> None:
    """Append rows of rotated keys and of values, both float32 [rows, kv_heads * head_dim], to a cache."""
    rows = _f32(k, "kv_append", "k", (None, None))
    _f32(v, "kv_append", "v", tuple(k.shape))
    _C.kv_append(ctx or context(), cache, layer, k.data_ptr(), v.data_ptr(), rows)


def attention(
    q: Tensor,
    caches: Sequence[_C.KVCache],
    positions: Tensor,
    sequences: Tensor,
    num_heads: int,
    *,
    layer: int = 0,
    sliding_window: int = 0,
    scale: float | None = None,
    ctx: _C.OpContext | None = None,
) -> Tensor:
    """Causal attention of the rows of q [rows, heads * head_dim] over their caches.

    positions: int64 [rows], each row sees tokens 0..position (the last `sliding_window` of them, if not 0).
    sequences: int32 [rows] index into caches; rows of one sequence stand together, positions ascending.
    scale: None = 1 / sqrt(head_dim).
    """
    rows = _f32(q, "attention", "q", (None, None))
    _typed(positions, torch.int64, "attention", "positions", (rows,))
    _typed(sequences, torch.int32, "attention", "sequences", (rows,))
    head_dim = q.shape[1] // num_heads
    for row, (position, sequence) in enumerate(
        zip(positions.tolist(), sequences.tolist(), strict=True)
    ):
        if not 0 <= sequence < len(caches) or not 0 <= position < caches[sequence].length:
            raise ValueOutOfRangeError(
                f"attention: row {row} asks for position {position} of sequence {sequence}; there are {len(caches)} "
                f"caches of {[c.length for c in caches]} tokens"
            )
    out = torch.empty_like(q)
    _C.attention(
        ctx or context(),
        list(caches),
        layer,
        q.data_ptr(),
        rows,
        num_heads,
        positions.data_ptr(),
        sequences.data_ptr(),
        sliding_window,
        head_dim**-0.5 if scale is None else scale,
        out.data_ptr(),
    )
    return out


def feed_forward(
    y: Tensor,
    h: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    down: PackedWeight,
    *,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    ctx: _C.OpContext | None = None,
) -> Tensor:
    """h[index] += scale * W_down(silu(W_gate y[index]) * W_up y[index]) in place; returns h [rows, d]."""
    return _gated_mlp(_C.feed_forward, "feed_forward", y, h, (gate, up, down), index, scale, ctx)


def adapter(
    y: Tensor,
    h: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    down: PackedWeight,
    *,
    index: Tensor | None = None,
    scale: Tensor | None = None,
    ctx: _C.OpContext | None = None,
) -> Tensor:
    """The same map with the adapter's narrow weights, for skipped rows."""
    return _gated_mlp(_C.adapter, "adapter", y, h, (gate, up, down), index, scale, ctx)


def lm_head(
    h: Tensor, norm: Tensor, weight: PackedWeight, eps: float, *, ctx: _C.OpContext | None = None
) -> Tensor:
    """Logits [rows, vocab] of h [rows, d]: W Norm(h)."""
    rows = _f32(h, "lm_head", "h", (None, weight.k))
    _f32(norm, "lm_head", "norm", (weight.k,))
    logits = torch.empty(rows, weight.n)
    _C.lm_head(
        ctx or context(),
        h.data_ptr(),
        rows,
        weight.k,
        norm.data_ptr(),
        eps,
        weight.pointer,
        weight.code,
        weight.n,
        logits.data_ptr(),
    )
    return logits


def _gated_mlp(
    function: object,
    op: str,
    y: Tensor,
    h: Tensor,
    weights: tuple[PackedWeight, PackedWeight, PackedWeight],
    index: Tensor | None,
    scale: Tensor | None,
    ctx: _C.OpContext | None,
) -> Tensor:
    gate, up, down = weights
    if (up.n, up.k) != (gate.n, gate.k) or (down.n, down.k) != (gate.k, gate.n):
        raise ShapeError(
            f"{op}: gate {[gate.n, gate.k]}, up {[up.n, up.k]}, down {[down.n, down.k]}; wanted [w, d], [w, d], [d, w]"
        )
    rows = _f32(y, op, "y", (None, gate.k)) if index is None else _index(index, y, op)
    _f32(h, op, "h", tuple(y.shape))
    if scale is not None:
        _f32(scale, op, "scale", (rows,))
    assert callable(function)
    function(
        ctx or context(),
        y.data_ptr(),
        rows,
        gate.k,
        _pointer(index),
        gate.pointer,
        up.pointer,
        down.pointer,
        gate.code,
        gate.n,
        _pointer(scale),
        h.data_ptr(),
    )
    return h


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _f32(tensor: Tensor, op: str, name: str, shape: tuple[int | None, ...]) -> int:
    return _typed(tensor, torch.float32, op, name, shape)


def _typed(
    tensor: Tensor, dtype: torch.dtype, op: str, name: str, shape: tuple[int | None, ...]
) -> int:
    """Check type, place, shape (None = any) and contiguity; returns the first dimension."""
    if tensor.dtype != dtype:
        raise DtypeError(f"{op}: {name} has dtype {tensor.dtype}; wanted {dtype}")
    if tensor.device.type != "cpu":
        raise DtypeError(f"{op}: {name} lies on {tensor.device}; this build computes on the CPU")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=False)
    )
    if not fits:
        raise ShapeError(
            f"{op}: {name} is {list(tensor.shape)}; wanted {['any' if s is None else s for s in shape]}"
        )
    if not tensor.is_contiguous():
        raise ShapeError(f"{op}: {name} is not contiguous; call .contiguous() first")
    return int(tensor.shape[0])


def _index(index: Tensor, x: Tensor, op: str) -> int:
    _f32(x, op, "x", (None,) * x.dim())
    count = _typed(index, torch.int32, op, "index", (None,))
    if count and not 0 <= int(index.min()) <= int(index.max()) < x.shape[0]:
        raise ValueOutOfRangeError(
            f"{op}: index reaches {int(index.min())}..{int(index.max())} of {x.shape[0]} rows"
        )
    return count
