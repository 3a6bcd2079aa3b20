"""Each op of the CPU engine alone, at the shapes of a model, with weights that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from flexidepth.config import FlexiDepthConfig
from flexidepth_ext import _C, ops
from flexidepth_ext.ops import PackedWeight

_COLD_BYTES = 256 << 20  # what the copies of an op's weights take together
_MOST_COPIES = 64
_EPS = 1e-5
Run = Callable[[], object]


@dataclass(frozen=True)
class OpRow:
    """name, what: the op and its sizes. rows: tokens. us_median, us_p99: microseconds. megabytes: of weights, and of
    keys and values, that it reads. bandwidth_share: of the memory's. gflop_per_s: multiply-adds x 2."""

    name: str
    what: str
    rows: int
    us_median: float
    us_p99: float
    megabytes: float
    gb_per_s: float
    bandwidth_share: float
    gflop_per_s: float
    samples: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every sample included."""
        return asdict(self)


@dataclass(frozen=True)
class OpCase:
    """make: one copy of the weights, and what runs the op on it. nbytes: read by a run. flops: of a run."""

    name: str
    what: str
    rows: int
    nbytes: int
    flops: float
    make: Callable[[], Run]


def op_cases(
    config: FlexiDepthConfig, dtype: torch.dtype, rows: int, depth: int, ctx: _C.OpContext
) -> list[OpCase]:
    """Every op of a routed layer and the LM head, for `rows` tokens, `depth` more in the cache before them."""
    size = torch.empty((), dtype=dtype).element_size()
    d, f, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * dim, config.num_key_value_heads * dim
    code, narrow, vocab = config.router_dim, config.adapter_dim, config.vocab_size
    x = torch.randn(rows, d)
    norm = torch.ones(d)

    def matrix(n: int, k: int, kind: torch.dtype = dtype) -> PackedWeight:
        return PackedWeight(torch.randn(n, k).mul_(k**-0.5), kind)

    def product(n: int, k: int) -> Callable[[], Run]:
        given = torch.randn(rows, k)

        def make() -> Run:
            weight = matrix(n, k)
            return lambda: ops.linear(given, weight, ctx=ctx)

        return make

    def gate() -> Run:
        enc, inner, folded = matrix(code, d, torch.float32), torch.ones(code), torch.randn(code)
        return lambda: ops.router_gate(x, enc, inner, folded=folded, eps=_EPS, ctx=ctx)

    def keys_values() -> Run:
        """What is left of a skipped token's attention: norm, K, V, rotation, cache."""
        k, v = matrix(kv, d), matrix(kv, d)
        cache = ops.new_cache(dtype, 1, config.num_key_value_heads, dim, depth + rows)
        ops.kv_append(cache, torch.zeros(max(depth, 1), kv), torch.zeros(max(depth, 1), kv))
        positions = torch.arange(depth, depth + rows)
        inv_freq = torch.rand(dim // 2)

        def run() -> None:
            cache.truncate(depth)
            y = ops.rms_norm(x, norm, _EPS, ctx=ctx)
            keys = ops.rope(ops.linear(y, k, ctx=ctx), positions, inv_freq, dim, ctx=ctx)
            ops.kv_append(cache, keys, ops.linear(y, v, ctx=ctx), ctx=ctx)

        return run

    def attention(running: int) -> Callable[[], Run]:
        """Queries of the first `running` of every second token: compacted, positions with gaps."""

        def make() -> Run:
            cache = ops.new_cache(dtype, 1, config.num_key_value_heads, dim, depth + rows)
            ops.kv_append(cache, torch.randn(depth + rows, kv), torch.randn(depth + rows, kv))
            queries = torch.randn(running, q)
            step = max(1, rows // running)
            positions = torch.arange(depth, depth + running * step, step)
            sequences = torch.zeros(running, dtype=torch.int32)
            heads = config.num_attention_heads
            return lambda: ops.attention(queries, [cache], positions, sequences, heads, ctx=ctx)

        return make

    def mlp(op: Callable[..., Tensor], width: int) -> Callable[[], Run]:
        def make() -> Run:
            weights = matrix(width, d), matrix(width, d), matrix(d, width)
            h, scale = torch.zeros(rows, d), torch.full((rows,), 1e-3)
            return lambda: op(x, h, *weights, scale=scale, ctx=ctx)

        return make

    def head() -> Run:
        weight = matrix(vocab, d)
        return lambda: ops.lm_head(x, norm, weight, _EPS, ctx=ctx)

    def compaction() -> Run:
        gates = torch.rand(rows)
        return lambda: ops.compact(gates, 0.5)

    running = max(1, rows // 2)
    seen = running * depth + running * (rows + 1) / 2
    past = 2 * (depth + rows) * kv * size
    half = 3 * d * narrow
    return [
        OpCase("router gate", f"{d} -> {code}", rows, 4 * code * (d + 2), 2.0 * rows * code * d, gate),
        OpCase("compaction", "", rows, 0, 0.0, compaction),
        OpCase("KV-only pass", f"2 x {d} -> {kv}", rows, 2 * kv * d * size, 4.0 * rows * kv * d, keys_values),
        OpCase("queries", f"{d} -> {q}", rows, q * d * size, 2.0 * rows * q * d, product(q, d)),
        OpCase("attention", f"{running} queries, {depth + rows} keys", rows, past, 4.0 * seen * q, attention(running)),
        OpCase("output", f"{q} -> {d}", rows, q * d * size, 2.0 * rows * q * d, product(d, q)),
        OpCase("feed-forward", f"width {f}", rows, 3 * d * f * size, 6.0 * rows * d * f, mlp(ops.feed_forward, f)),
        OpCase("adapter", f"width {narrow}", rows, half * size, 2.0 * rows * half, mlp(ops.adapter, narrow)),
        OpCase("LM head", f"{d} -> {vocab}", rows, vocab * d * size, 2.0 * rows * vocab * d, head),
    ]  # fmt: skip


def measure_ops(
    config: FlexiDepthConfig,
    dtype: torch.dtype,
    rows: Sequence[int],
    *,
    depth: int,
    threads: int,
    bandwidth: float,
    repeats: int = 20,
    notify: Callable[[str], None] = lambda _: None,
) -> list[OpRow]:
    """A row for each op and number of tokens. bandwidth: GB/s of the machine's memory."""
    ctx = ops.context(threads)
    found = []
    for count in rows:
        for case in op_cases(config, dtype, count, depth, ctx):
            notify(f"{case.name}, {count} rows")
            found.append(_measure(case, bandwidth, repeats))
    return found


def _measure(case: OpCase, bandwidth: float, repeats: int) -> OpRow:
    copies = 1
    if case.nbytes:
        copies = min(_MOST_COPIES, max(2, -(-_COLD_BYTES // case.nbytes)))
    runs = [case.make() for _ in range(copies)]
    for run in runs[: max(2, min(3, copies))]:
        run()
    samples = []
    for run, _ in zip(cycle(runs), range(max(repeats, 3)), strict=False):
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
    median, ordered = statistics.median(samples), sorted(samples)
    gigabytes = case.nbytes / median / 1e9
    return OpRow(
        case.name,
        case.what,
        case.rows,
        median * 1e6,
        ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
        case.nbytes / 1e6,
        gigabytes,
        gigabytes / bandwidth,
        case.flops / median / 1e9,
        samples,
    )
