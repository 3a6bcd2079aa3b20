"""The CUDA ops that compute several parts of a layer in one phase, checked; `cuda_ops.CudaOps` has them too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .cuda_call import Call, ModuleOps, Weight
from .cuda_tensors import Decisions, PagedCache, RouterWeights
from .errors import DtypeError, ShapeError, ValueOutOfRangeError
from .model_shape import ORDERS

MAX_ROUTE_ROWS = 8
_MAX_AHEAD = 5


class LayerOps(ModuleOps):
    """What a layer's phases are; csrc/ops has the maths of each."""

    def project(
        self,
        h: Tensor,
        norm: Tensor,
        eps: float,
        *,
        table: Tensor,
        first: Tensor | None = None,
        first_bias: Tensor | None = None,
        rotate_first: bool = False,
        k: Tensor | None = None,
        k_bias: Tensor | None = None,
        v: Tensor | None = None,
        v_bias: Tensor | None = None,
        cache: PagedCache | None = None,
        layer: int = 0,
        positions: Tensor | None = None,
        sequences: Tensor | None = None,
        index: Tensor | None = None,
        live: Tensor | None = None,
    ) -> Tensor | None:
        """RMSNorm of h [rows, d] and up to three products with it; see csrc/ops/project.h.

        first [n, d] gives a result [rows, n], rotated with `rotate_first`; not rotated, as the router's, it may be
        float32 beside k and v of another type. These go, k rotated, into `cache` at positions and sequences.

        Returns:
            What `first` gives, 0 for rows that are not there; None where it was not asked.
        """
        with self._call("project", h) as call:
            rows, width = h.shape
            count = rows if index is None else index.shape[0]
            matrices = [t for t in (first, k, v) if t is not None]
            if not matrices or (k is None) != (v is None) or (k is None) != (cache is None):
                raise ShapeError("project: give first, or k, v and their cache, or all of them")
            code = first is not None and first.dtype == torch.float32 and not rotate_first
            if len({t.dtype for t in (matrices[1:] if code else matrices)}) > 1:
                raise DtypeError(
                    f"project: matrices of {_types(matrices)}; wanted one type (but the router's, which may be float32)"
                )
            _check_width(call, matrices, width)
            out = None
            if first is not None:  # of rows that are not there nothing is written
                make = h.new_empty if live is None else h.new_zeros
                out = make(count, first.shape[0])
            none = self.module.Matrix()
            self.module.project(
                call.stream,
                call.rows("h", h, width, index, live),
                call.vector("norm", norm, width),
                eps,
                none if first is None else call.matrix("first", first, first_bias),
                self.module.Rows() if out is None else call.rows("first_out", out, out.shape[1]),
                rotate_first,
                none if k is None else call.matrix("k", k, k_bias),
                none if v is None else call.matrix("v", v, v_bias),
                call.rows("table", table, table.shape[-1], index),
                self.module.Pages() if cache is None else cache.argument(self, layer),
                call.vector("positions", positions, None, torch.int64),
                call.vector("sequences", sequences, None, torch.int32),
            )
        return out

    def router_code(
        self, h: Tensor, enc: Tensor, norm: Tensor, eps: float, *, ahead: Sequence[Tensor] = ()
    ) -> Tensor:
        """W_enc RMSNorm(h) [rows, d_r] of h [rows, d], at most 8 rows; enc float32 [d_r, d].

        ahead: at most 5 tensors that are brought into the L2 cache meanwhile.
        """
        with self._call("router_code", h) as call:
            rows, width = h.shape
            _check_few(call, rows)
            if len(ahead) > _MAX_AHEAD:
                raise ShapeError(
                    f"router_code: {len(ahead)} tensors ahead; wanted at most {_MAX_AHEAD}"
                )
            _check_width(call, [enc], width)
            encoded = h.new_empty(rows, enc.shape[0])
            pieces = [(call.address("ahead", tensor), tensor.nbytes) for tensor in ahead]
            self.module.router_code(
                call.stream,
                call.rows("h", h, width),
                call.vector("norm", norm, width),
                eps,
                call.matrix("enc", enc, float_only=True),
                call.rows("encoded", encoded, enc.shape[0]),
                pieces + [(0, 0)] * (_MAX_AHEAD - len(pieces)),
            )
        return encoded

    def routed_entry(
        self,
        h: Tensor,
        encoded: Tensor,
        router: RouterWeights,
        *,
        norm: Tensor,
        q: Weight,
        k: Weight,
        v: Weight,
        table: Tensor,
        cache: PagedCache,
        positions: Tensor,
        sequences: Tensor,
        adapter_norm: Tensor,
        gate: Weight,
        up: Weight,
        eps: float,
        layer: int = 0,
        threshold: float = 0.5,
        forced: Tensor | None = None,
        unit_scales: bool = False,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Decisions]:
        """Decisions out of codes [rows, d_r], at most 8 rows, and what either way through the layer begins with.

        Keys (rotated) and values of every row go into `cache`. gate, up: the adapter's [width, d]; adapter_norm: [d],
        of its input. The router is folded. threshold, forced, unit_scales: as those of `compact`. out: where queries
        and activation go; None = tensors of zeros, which are filled by two more kernels.

        Returns:
            Rotated queries [rows, n], of which row i is of the i-th row that runs; the adapter's activation
            [rows, width], row i of the i-th row that skips; both 0 behind those, or what `out` held. And the decisions.
        """
        with self._call("routed_entry", h) as call:
            rows, width = h.shape
            _check_few(call, rows)
            if router.folded is None:
                raise ValueOutOfRangeError(
                    "routed_entry: a strict router; wanted one that has folded; call router_gate and compact"
                )
            weights = {"q": q, "k": k, "v": v, "gate": gate, "up": up}
            matrices = {name: _matrix(weight) for name, weight in weights.items()}
            _check_width(call, matrices.values(), width)
            _check_one_type(call, matrices.values())
            if matrices["gate"].shape != matrices["up"].shape:
                raise ShapeError(
                    f"routed_entry: gate {list(matrices['gate'].shape)}, up {list(matrices['up'].shape)}; wanted "
                    "[w, d] both"
                )
            given = {name: call.weight(name, weight) for name, weight in weights.items()}
            queries, activation = _outputs(
                call, h, out, [("queries", matrices["q"]), ("activation", matrices["gate"])]
            )
            decisions = Decisions.empty(rows, h.device)
            gates, _ = router_argument(call, encoded, router, decisions.gates)
            self.module.routed_entry(
                call.stream,
                call.rows("h", h, width),
                call.vector("norm", norm, width),
                eps,
                given["q"],
                call.rows("queries", queries, queries.shape[1]),
                given["k"],
                given["v"],
                call.rows("table", table, cache.head_dim),
                cache.argument(self, layer),
                call.vector("positions", positions, rows, torch.int64),
                call.vector("sequences", sequences, rows, torch.int32),
                gates,
                compact_argument(call, decisions, threshold, forced, unit_scales),
                call.vector("adapter_norm", adapter_norm, width),
                given["gate"],
                given["up"],
                activation.data_ptr(),
            )
        return queries, activation, decisions

    def routed_exit(
        self,
        h: Tensor,
        decisions: Decisions,
        *,
        feed_forward: tuple[Tensor, Weight],
        adapter: tuple[Tensor, Weight],
    ) -> Tensor:
        """h [rows, d] += scale * W_down activation in place, at most 8 rows; returns h.

        feed_forward, adapter: an activation [rows, width], whose row i is of the i-th row that runs, or skips, and
        W_down [d, width].
        """
        with self._call("routed_exit", h) as call:
            _check_few(call, h.shape[0])
            _check_one_type(call, [_matrix(down) for _, down in (feed_forward, adapter)])
            ran, skipped = (decisions.counts[i : i + 1] for i in range(2))
            self.module.routed_exit(
                call.stream,
                _half(call, h, *feed_forward, decisions.run_index, ran, decisions.run_scale),
                _half(call, h, *adapter, decisions.skip_index, skipped, decisions.skip_scale),
            )
        return h


def router_argument(
    call: Call, encoded: Tensor, router: RouterWeights, gates: Tensor
) -> tuple[Any, Tensor | None]:
    """(argument of the compiled ops, scratch to keep alive)."""
    if router.order not in ORDERS:
        raise ValueOutOfRangeError(
            f"{call.op}: order {router.order!r}; wanted {' or '.join(ORDERS)}"
        )
    strict = router.folded is None
    if strict and (router.dec is None or router.head is None):
        raise ShapeError(f"{call.op}: give a router that has folded, or dec and head")
    rows, dim = encoded.shape
    if gates.shape[0] != rows:
        raise ShapeError(f"{call.op}: codes of {rows} rows; there are {gates.shape[0]}")
    if router.dec is not None and router.dec.shape[-1] != dim:
        raise ShapeError(f"{call.op}: dec is {list(router.dec.shape)}; wanted [d, {dim}]")
    decoded = None
    if router.dec is not None and strict:
        decoded = encoded.new_empty(rows, router.dec.shape[0])
    argument = call.module.Router(
        call.rows("encoded", encoded, dim),
        call.module.Rows() if decoded is None else call.rows("decoded", decoded, decoded.shape[1]),
        call.vector("norm", router.norm, dim),
        call.vector("folded", router.folded, dim),
        call.vector("head", router.head, None if router.dec is None else router.dec.shape[0]),
        gates.data_ptr(),
        call.module.Matrix()
        if router.dec is None
        else call.matrix("dec", router.dec, float_only=True),
        router.bias,
        router.eps,
        ORDERS[router.order],
    )
    return argument, decoded


def compact_argument(
    call: Call,
    decisions: Decisions,
    threshold: float,
    forced: Tensor | None,
    unit_scales: bool,
) -> Any:
    """Gates, and where decisions on them go, as the compiled ops take them."""
    if not 0.0 <= threshold <= 1.0:
        raise ValueOutOfRangeError(f"{call.op}: threshold is {threshold}; wanted a value in [0, 1]")
    rows = decisions.ran.shape[0]
    return call.module.Compact(
        call.vector("gates", decisions.gates, rows),
        call.vector("forced", forced, rows, torch.uint8),
        *(
            getattr(decisions, name).data_ptr()
            for name in ("ran", "run_index", "skip_index", "run_scale", "skip_scale", "counts")
        ),
        rows,
        threshold,
        unit_scales,
    )


def _check_few(call: Call, rows: int) -> None:
    if rows > MAX_ROUTE_ROWS:
        raise ValueOutOfRangeError(
            f"{call.op}: {rows} rows; wanted at most {MAX_ROUTE_ROWS}; the separate ops take more"
        )


def _outputs(
    call: Call,
    h: Tensor,
    out: tuple[Tensor, Tensor] | None,
    products: Sequence[tuple[str, Tensor]],
) -> list[Tensor]:
    """Where the products of h [rows, d] with named matrices [n, d] go, [rows, n] each: `out`, checked, or zeros."""
    if out is None:
        return [h.new_zeros(h.shape[0], matrix.shape[0]) for _, matrix in products]
    for (name, matrix), tensor in zip(products, out, strict=True):
        call.rows(name, tensor, matrix.shape[0])
        if tensor.shape[0] != h.shape[0]:
            raise ShapeError(
                f"{call.op}: {name} is {list(tensor.shape)}; wanted [{h.shape[0]}, {matrix.shape[0]}]"
            )
    return list(out)


def _half(
    call: Call,
    h: Tensor,
    activation: Tensor,
    down: Weight,
    index: Tensor,
    live: Tensor,
    scale: Tensor,
) -> Any:
    (rows, width), matrix = h.shape, _matrix(down)
    if matrix.shape[0] != width or activation.shape[0] != rows:
        raise ShapeError(
            f"{call.op}: an activation {list(activation.shape)} and down {list(matrix.shape)} for h {list(h.shape)}; "
            "wanted [rows, w] and [d, w]"
        )
    return call.module.HalfMlp(
        call.rows("activation", activation, matrix.shape[1], live=live),
        call.rows("h", h, width, index, live),
        call.weight("down", down),
        call.vector("scale", scale, rows),
    )


def _matrix(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight[0]


def _check_width(call: Call, matrices: Collection[Tensor], width: int) -> None:
    if any(t.dim() != 2 or t.shape[-1] != width for t in matrices):
        raise ShapeError(
            f"{call.op}: matrices of {[list(t.shape) for t in matrices]}; wanted [n, {width}]"
        )


def _check_one_type(call: Call, matrices: Collection[Tensor]) -> None:
    if len({t.dtype for t in matrices}) > 1:
        raise DtypeError(f"{call.op}: matrices of {_types(matrices)}; wanted one type")


def _types(matrices: Collection[Tensor]) -> str:
    return ", ".join(str(t.dtype) for t in matrices)
