"""The ops to time on a device, at the shapes of a model, with the bytes that each has to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexidepth_ext.cuda_ops import CudaOps, PagedCache, RouterWeights

LARGE = 30e6  # bytes from which on a matrix must reach the bandwidth


@dataclass(frozen=True)
class Shape:
    """Of a model whose layers are timed."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    router_dim: int
    adapter: int
    context: int


LLAMA_3_8B = Shape("Llama-3-8B", 4096, 14336, 32, 8, 128, 128256, 256, 896, 8192)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 9, 3, 64, 49152, 36, 192, 2048)


@dataclass(frozen=True)
class Target:
    """Either a share of the copy bandwidth that must be reached, or `factor` times the time of the bytes at that
    bandwidth and `extra` microseconds more."""

    share: float | None = None
    factor: float = 0.0
    extra: float = 0.0

    def most_microseconds(self, nbytes: float, bandwidth: float) -> float:
        """The time that is allowed; bandwidth in bytes a second."""
        floor = nbytes / bandwidth * 1e6
        return floor / self.share if self.share is not None else self.factor * floor + self.extra

    def __str__(self) -> str:
        if self.share is not None:
            return f">= {self.share:.0%} of copy bandwidth"
        if self.factor == 0:
            return f"<= {self.extra:g} us"
        return f"<= {self.factor:g} x bytes / bandwidth + {self.extra:g} us"


@dataclass(frozen=True)
class OpCase:
    """make() gives one copy of the op's weights and of what it writes to, and a function that queues the op's kernels
    and no others. Copies are run in turn, so that none is found in a cache. nbytes: read from memory by a run that
    finds nothing in a cache. flops: of the tensor cores, where they are what it waits for."""

    op: str
    what: str
    rows: int
    nbytes: float
    make: Callable[[], Callable[[], object]]
    target: Target | None = None
    flops: float = 0.0


def op_cases(
    ops: CudaOps, shape: Shape, dtype: torch.dtype, device: str, rows: tuple[int, ...]
) -> Iterator[OpCase]:
    """Every op of a routed layer, and the head."""
    size = torch.empty((), dtype=dtype).element_size()
    d, f = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(n: int, k: int) -> Tensor:
        return torch.randn(n, k, device=device, dtype=dtype).mul_(k**-0.5)

    def activations(count: int, width: int) -> Tensor:
        return torch.randn(count, width, device=device)

    def linear(n: int, k: int, count: int) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            w, x = matrix(n, k), activations(count, k)
            out = torch.zeros(count, n, device=device)
            return lambda: ops.linear(x, w, out=out)

        return make

    def mlp(op: str, width: int, count: int) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            weights = matrix(width, d), matrix(width, d), matrix(d, width)
            h, norm = activations(count, d), torch.ones(d, device=device)
            scale = torch.full((count,), 1e-3, device=device)
            run = getattr(ops, op)
            return lambda: run(h, h, *weights, scale=scale, norm=norm, eps=1e-5)

        return make

    for count in rows:
        for n, k in ((q, d), (d, q), (kv, d), (f, d), (d, f)):
            nbytes = float(n * k * size)
            large = count == 1 and nbytes >= LARGE
            yield OpCase(
                "linear",
                f"[{n}, {k}]",
                count,
                nbytes,
                linear(n, k, count),
                Target(0.85) if large else None,
            )
        yield OpCase(
            "feed_forward",
            f"width {f}",
            count,
            3.0 * d * f * size,
            mlp("feed_forward", f, count),
            None,
        )
        yield OpCase(
            "adapter",
            f"width {shape.adapter}",
            count,
            3.0 * d * shape.adapter * size,
            mlp("adapter", shape.adapter, count),
            Target(factor=1.15, extra=5.0) if count == 1 else None,
        )
        yield _head(ops, shape, matrix, activations, device, count, size)
        yield _attention(ops, shape, dtype, activations, device, count, size)
    yield _prompt_attention(ops, shape, dtype, activations, device, size)
    yield _compaction(ops, device)


def _head(
    ops: CudaOps,
    shape: Shape,
    matrix: Callable[[int, int], Tensor],
    activations: Callable[[int, int], Tensor],
    device: str,
    rows: int,
    size: int,
) -> OpCase:
    def make() -> Callable[[], object]:
        w, h = matrix(shape.vocab, shape.hidden), activations(rows, shape.hidden)
        norm = torch.ones(shape.hidden, device=device)
        return lambda: ops.logits(h, norm, w, 1e-5)

    nbytes = float(shape.vocab * shape.hidden * size)
    target = Target(0.85) if rows == 1 and nbytes >= LARGE else None
    return OpCase("lm_head", f"vocabulary {shape.vocab}", rows, nbytes, make, target)


def _attention(
    ops: CudaOps,
    shape: Shape,
    dtype: torch.dtype,
    activations: Callable[[int, int], Tensor],
    device: str,
    rows: int,
    size: int,
) -> OpCase:
    """Each row a sequence of its own, at the end of the context."""

    def make() -> Callable[[], object]:
        cache = PagedCache(
            ops, dtype, 1, shape.kv_heads, shape.head_dim, shape.context, rows, device=device
        )
        q = activations(rows, shape.heads * shape.head_dim)
        positions = torch.full((rows,), shape.context - 1, dtype=torch.long, device=device)
        sequences = torch.arange(rows, dtype=torch.int32, device=device)
        room = ops.attention_workspace(rows, shape.heads, cache)
        return lambda: ops.attention(q, cache, positions, sequences, shape.heads, workspace=room)

    nbytes = 2.0 * rows * shape.context * shape.kv_heads * shape.head_dim * size
    target = Target(0.75) if rows == 1 else None
    return OpCase("attention", f"context {shape.context}", rows, nbytes, make, target)


def _prompt_attention(
    ops: CudaOps,
    shape: Shape,
    dtype: torch.dtype,
    activations: Callable[[int, int], Tensor],
    device: str,
    size: int,
) -> OpCase:
    """Every second token of a prompt runs the layer."""
    tokens = min(2048, shape.context)
    rows = tokens // 2

    def make() -> Callable[[], object]:
        cache = PagedCache(ops, dtype, 1, shape.kv_heads, shape.head_dim, tokens, 1, device=device)
        cache.pages.zero_()
        q = activations(rows, shape.heads * shape.head_dim)
        positions = torch.arange(tokens, device=device)
        sequences = torch.zeros(tokens, dtype=torch.int32, device=device)
        index = torch.arange(0, tokens, 2, dtype=torch.int32, device=device)
        return lambda: ops.attention(
            q, cache, positions, sequences, shape.heads, index=index, prompt=True
        )

    nbytes = 2.0 * tokens * shape.kv_heads * shape.head_dim * size
    flops = 4.0 * rows * tokens / 2 * shape.heads * shape.head_dim
    return OpCase("attention", f"of {tokens} tokens", rows, nbytes, make, flops=flops)


def _compaction(ops: CudaOps, device: str, rows: int = 4096) -> OpCase:
    def make() -> Callable[[], object]:
        gates = torch.rand(rows, device=device)
        return lambda: ops.compact(gates, 0.5)

    return OpCase("compact", "gates", rows, 4.0 * rows, make, Target(extra=5.0))


def router_case(ops: CudaOps, shape: Shape, device: str, rows: int = 1) -> OpCase:
    """The gate by itself."""

    def make() -> Callable[[], object]:
        encoded = torch.randn(rows, shape.router_dim, device=device)
        router = RouterWeights(
            torch.ones(shape.router_dim, device=device),
            folded=torch.randn(shape.router_dim, device=device),
        )
        return lambda: ops.router_gate(encoded, router)

    return OpCase(
        "router_gate", f"d_r {shape.router_dim}", rows, 4.0 * rows * shape.router_dim, make
    )
