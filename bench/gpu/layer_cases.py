"""The phases of a routed layer of a few rows as cases to time, each way through the layer by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flexidepth_ext.cuda_ops import CudaOps, Decisions, PagedCache, RouterWeights

from .cases import OpCase, Shape, Target

MOST_ROWS = 8
_EPS = 1e-5


class _Layer:
    """Weights and buffers of one layer, all rows of which take the same way."""

    def __init__(
        self, ops: CudaOps, shape: Shape, dtype: torch.dtype, device: str, rows: int, runs: bool
    ) -> None:
        d, f, a = shape.hidden, shape.intermediate, shape.adapter
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

        def matrix(n: int, k: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(n, k, device=device, dtype=kind).mul_(k**-0.5)

        self.ops = ops
        self.h = torch.randn(rows, d, device=device)
        self.norm = torch.ones(d, device=device)
        self.enc = matrix(shape.router_dim, d, torch.float32)
        self.encoded = torch.randn(rows, shape.router_dim, device=device)
        ones = torch.ones(shape.router_dim, device=device)
        self.router = RouterWeights(ones, folded=ones)
        self.q, self.k, self.v = matrix(q, d), matrix(kv, d), matrix(kv, d)
        self.gate, self.up, self.adapter_down = matrix(a, d), matrix(a, d), matrix(d, a)
        self.down = matrix(d, f)
        self.activation = torch.randn(rows, f, device=device)
        self.adapter_activation = torch.randn(rows, a, device=device)
        self.out = torch.zeros(rows, q, device=device), torch.zeros(rows, a, device=device)
        self.cache = PagedCache(
            ops, dtype, 1, shape.kv_heads, shape.head_dim, 256, rows, device=device
        )
        self.table = torch.randn(rows, shape.head_dim, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)
        self.sequences = torch.arange(rows, dtype=torch.int32, device=device)
        self.forced = torch.full((rows,), int(runs), dtype=torch.uint8, device=device)
        index = torch.arange(rows, dtype=torch.int32, device=device)
        scale = torch.full((rows,), 1e-3, device=device)
        counts = torch.tensor([rows, 0] if runs else [0, rows], dtype=torch.int32, device=device)
        self.decisions = Decisions(scale, self.forced, index, index, scale, scale, counts)

    def code(self, *ahead: Tensor) -> Tensor:
        return self.ops.router_code(self.h, self.enc, self.norm, _EPS, ahead=ahead)

    def entry(self, encoded: Tensor | None = None) -> tuple[Tensor, Tensor, Decisions]:
        return self.ops.routed_entry(
            self.h,
            self.encoded if encoded is None else encoded,
            self.router,
            norm=self.norm,
            q=self.q,
            k=self.k,
            v=self.v,
            table=self.table,
            cache=self.cache,
            positions=self.positions,
            sequences=self.sequences,
            adapter_norm=self.norm,
            gate=self.gate,
            up=self.up,
            eps=_EPS,
            forced=self.forced,
            out=self.out,
        )

    def exit(self, adapter: Tensor | None = None) -> Tensor:
        return self.ops.routed_exit(
            self.h,
            self.decisions,
            feed_forward=(self.activation, self.down),
            adapter=(self.adapter_activation if adapter is None else adapter, self.adapter_down),
        )

    def skipped(self) -> Tensor:
        """All that a skipped layer reads: codes, entry with K and V brought closer, exit."""
        _, activation, _ = self.entry(self.code(self.k, self.v))
        return self.exit(activation)


def layer_cases(
    ops: CudaOps, shape: Shape, dtype: torch.dtype, device: str, rows: tuple[int, ...]
) -> Iterator[OpCase]:
    """router_code; routed_entry and routed_exit of rows that run and of rows that skip; a skipped layer's three."""
    size = torch.empty((), dtype=dtype).element_size()
    d, f, a = shape.hidden, shape.intermediate, shape.adapter
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    code = 4.0 * shape.router_dim * d
    skip_entry, skip_exit = float((2 * kv + 2 * a) * d * size), float(a * d * size)

    def case(
        op: str,
        what: str,
        count: int,
        nbytes: float,
        runs: bool,
        run: Callable[[_Layer], Callable[[], Any]],
        target: Target,
    ) -> OpCase:
        def make() -> Callable[[], object]:
            return run(_Layer(ops, shape, dtype, device, count, runs))

        return OpCase(op, what, count, nbytes, make, target if count == 1 else None)

    one = Target(factor=1.1, extra=3.0)
    for n in rows:
        if n > MOST_ROWS:
            continue
        yield case("router_code", f"d_r {shape.router_dim}", n, code, True, lambda x: x.code, one)
        for runs, nbytes in ((True, float((q + 2 * kv) * d * size)), (False, skip_entry)):
            what = "rows run" if runs else "rows skip"
            yield case("routed_entry", what, n, nbytes, runs, lambda x: x.entry, one)
        for runs, nbytes in ((True, float(f * d * size)), (False, skip_exit)):
            what = "rows run" if runs else "rows skip"
            yield case("routed_exit", what, n, nbytes, runs, lambda x: x.exit, one)
        nbytes = code + skip_entry + skip_exit
        three = Target(factor=1.1, extra=9.0)
        yield case("routed layer", "skipped", n, nbytes, False, lambda x: x.skipped, three)
