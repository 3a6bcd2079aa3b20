"""Each CUDA op on tensors, checked. For tests, benchmarks and experiments.

Activations are float32, weights float32, bfloat16 or float16 as they stand in a checkpoint, all on one device and
contiguous. Ops are queued on the current stream and wait for nothing; what is decided on the device (which rows
run a layer, and how many) stays there and is handed from op to op as `Decisions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_choice import blocks_may_wait
from .cuda_layer_ops import LayerOps, compact_argument, router_argument
from .cuda_prompt_ops import PromptOps
from .cuda_tensors import AttentionWorkspace, Decisions, PagedCache, RouterWeights, sample_room
from .errors import ShapeError, ValueOutOfRangeError

__all__ = [
    "AttentionWorkspace",
    "CudaOps",
    "Decisions",
    "PagedCache",
    "RouterWeights",
    "cuda_ops",
]


class CudaOps(LayerOps, PromptOps):
    """The ops of a compiled module; `cuda_ops()` gives those of this installation.

    Args:
        module: flexidepth_ext._cuda, or what has the same functions.
        device_type: of the tensors that it takes.
    """

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        index: Tensor | None = None,
        live: Tensor | None = None,
        out: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """x W^T + b [rows, n]; with `out` [.., n] given, out[index] += scale * (x[index] W^T + b).

        Args:
            x: [rows, k]. weight: [n, k]. index: int32, rows of x (and of out) to take. live: int32 [1], how many
                of them there are. scale: float32 [rows taken].
        """
        with self._call("linear", x) as call:
            rows = call.rows("x", x, weight.shape[-1], index, live)
            accumulate = out is not None
            count = x.shape[0] if index is None else index.shape[0]
            result = x.new_empty(count, weight.shape[0]) if out is None else out
            y = call.rows("out", result, weight.shape[0], index if accumulate else None, live)
            matrix = call.matrix("weight", weight, bias)
            self.module.linear(
                call.stream, rows, matrix, y, accumulate, call.vector("scale", scale, count)
            )
        return result

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [rows, width]."""
        with self._call("rms_norm", x) as call:
            out = torch.empty_like(x)
            rows, result = (call.rows(n, t, x.shape[-1]) for n, t in (("x", x), ("out", out)))
            norm = call.vector("weight", weight, x.shape[-1])
            self.module.rms_norm(call.stream, rows, result, norm, eps)
        return out

    def rope_table(self, positions: Tensor, inv_freq: Tensor) -> Tensor:
        """Cosines, then sines [rows, head_dim] of positions int64 [rows] and inv_freq [head_dim / 2]."""
        with self._call("rope_table", inv_freq) as call:
            rows, half = positions.shape[0], inv_freq.shape[0]
            table = inv_freq.new_empty(rows, 2 * half)
            self.module.rope_table(
                call.stream,
                call.vector("positions", positions, rows, torch.int64),
                call.vector("inv_freq", inv_freq, half),
                table.data_ptr(),
                rows,
                2 * half,
            )
        return table

    def rope(self, x: Tensor, table: Tensor, *, index: Tensor | None = None) -> Tensor:
        """x [rows, heads * head_dim] rotated; row i by row index[i] of rope_table's result."""
        with self._call("rope", x) as call:
            head_dim = table.shape[-1]
            if x.shape[-1] % head_dim:
                raise ShapeError(
                    f"rope: width {x.shape[-1]} is not a multiple of head_dim {head_dim}"
                )
            out = x.clone()
            rows = call.rows("x", out, x.shape[-1])
            self.module.rope(
                call.stream, rows, call.rows("table", table, head_dim, index), head_dim
            )
        return out

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of weight [vocab, d] as float32 [rows, d]; token_ids int32 [rows], not checked against vocab."""
        with self._call("embed", weight) as call:
            rows, width = token_ids.shape[0], weight.shape[1]
            h = torch.empty(rows, width, device=weight.device)
            ids = call.vector("token_ids", token_ids, rows, torch.int32)
            self.module.embed(
                call.stream, ids, call.matrix("weight", weight), call.rows("h", h, width)
            )
        return h

    def router_gate(self, encoded: Tensor, router: RouterWeights) -> Tensor:
        """Gates [rows] of codes W_enc x [rows, d_r]. The strict router leaves its z in `encoded`."""
        with self._call("router_gate", encoded) as call:
            gates = encoded.new_empty(encoded.shape[0])
            argument, _ = router_argument(call, encoded, router, gates)
            self.module.router_gate(call.stream, argument)
        return gates

    def compact(
        self,
        gates: Tensor,
        threshold: float,
        *,
        forced: Tensor | None = None,
        unit_scales: bool = False,
    ) -> Decisions:
        """Threshold and compaction of gates float32 [rows]; arguments as those of ops.compact."""
        with self._call("compact", gates) as call:
            decisions = Decisions.empty(gates.shape[0], gates.device)
            decisions.gates = gates
            self.module.compact(
                call.stream, compact_argument(call, decisions, threshold, forced, unit_scales)
            )
        return decisions

    def kv_append(
        self,
        cache: PagedCache,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        sequences: Tensor,
        *,
        layer: int = 0,
    ) -> None:
        """Rotated keys and values, float32 [rows, kv_heads * head_dim], into the cache.

        positions: int64 [rows], below the cache's max_length. sequences: int32 [rows]. Neither is checked: they are
        on the device.
        """
        with self._call("kv_append", k) as call:
            width = cache.num_kv_heads * cache.head_dim
            self.module.kv_append(
                call.stream,
                cache.argument(self, layer),
                call.rows("k", k, width),
                call.rows("v", v, width),
                call.vector("positions", positions, k.shape[0], torch.int64),
                call.vector("sequences", sequences, k.shape[0], torch.int32),
            )

    def attention_workspace(
        self, rows: int, num_heads: int, cache: PagedCache
    ) -> AttentionWorkspace:
        """Room for attention of up to `rows` rows over a cache; one call after the other may use it."""
        sizes = rows, num_heads, cache.head_dim, cache.max_pages
        device = cache.pages.device
        return AttentionWorkspace(
            torch.empty(self.module.attention_scratch_floats(*sizes), device=device),
            torch.zeros(
                self.module.attention_counters(rows, num_heads), dtype=torch.int32, device=device
            ),
        )

    def attention(
        self,
        q: Tensor,
        cache: PagedCache,
        positions: Tensor,
        sequences: Tensor,
        num_heads: int,
        *,
        index: Tensor | None = None,
        live: Tensor | None = None,
        layer: int = 0,
        sliding_window: int = 0,
        scale: float | None = None,
        workspace: AttentionWorkspace | None = None,
        prompt: bool = False,
    ) -> Tensor:
        """Causal attention of q [rows, heads * head_dim], each row from its own position.

        positions: int64, sequences: int32; row i has number index[i] of them. live: int32 [1], how many rows there
        are, the others' results are 0. scale: None = 1 / sqrt(head_dim). workspace: of attention_workspace, None =
        made for this call. prompt: many rows of a sequence; a bfloat16 or float16 cache then goes through the tensor
        cores, 64 rows of a sequence at a time, with queries and weights rounded to its type.
        """
        with self._call("attention", q) as call:
            width, rows = num_heads * cache.head_dim, q.shape[0]
            if num_heads % cache.num_kv_heads:
                raise ShapeError(
                    f"attention: {num_heads} heads for {cache.num_kv_heads} KV heads; wanted a multiple"
                )
            out = torch.empty_like(q) if live is None else torch.zeros_like(q)
            scratch = counters = 0
            if not (prompt and cache.dtype.itemsize == 2):
                room = workspace or self.attention_workspace(rows, num_heads, cache)
                needed = self.module.attention_scratch_floats(
                    rows, num_heads, cache.head_dim, cache.max_pages
                )
                if room.scratch.numel() < needed:
                    raise ShapeError(
                        f"attention: the workspace has {room.scratch.numel()} floats, {rows} rows need {needed}; "
                        "make it for as many rows"
                    )
                scratch, counters = room.scratch.data_ptr(), room.counters.data_ptr()
            self.module.attention(
                call.stream,
                cache.argument(self, layer),
                call.rows("q", q, width, None, live),
                call.rows("out", out, width),
                call.vector("positions", positions, None, torch.int64),
                call.vector("sequences", sequences, positions.shape[0], torch.int32),
                call.vector("index", index, rows, torch.int32),
                sliding_window,
                cache.head_dim**-0.5 if scale is None else scale,
                scratch,
                cache.max_pages,
                counters,
                prompt,
            )
        return out

    def feed_forward(
        self,
        y: Tensor,
        h: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        index: Tensor | None = None,
        live: Tensor | None = None,
        scale: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """h[index] += scale * W_down(silu(W_gate y[index]) * W_up y[index]) in place; returns h [rows, d].

        norm: [d], y is normed by it on the way (y may be h then). live: int32 [1], how many rows there are.
        """
        weights = gate, up, down
        return self._mlp("feed_forward", y, h, weights, index, live, scale, norm, eps)

    def adapter(
        self,
        y: Tensor,
        h: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        index: Tensor | None = None,
        live: Tensor | None = None,
        scale: Tensor | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """The same map with the adapter's narrow weights, for skipped rows."""
        weights = gate, up, down
        return self._mlp("adapter", y, h, weights, index, live, scale, norm, eps)

    def lm_head(
        self, h: Tensor, norm: Tensor, weight: Tensor, eps: float, *, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [rows, vocab] of h[index], W Norm(h), and the first of each row's largest, int64 [rows]."""
        rows = h.shape[0] if index is None else index.shape[0]
        best = torch.empty(rows, dtype=torch.int64, device=h.device)
        return self._logits(h, norm, weight, eps, index, best), ~best & 0xFFFFFFFF

    def logits(
        self, h: Tensor, norm: Tensor, weight: Tensor, eps: float, *, index: Tensor | None = None
    ) -> Tensor:
        """The logits of lm_head alone: its kernel and nothing else, as in a pass of the engine."""
        return self._logits(h, norm, weight, eps, index, None)

    def sample(
        self,
        logits: Tensor,
        seeds: Tensor,
        positions: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        settings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token of each row of logits [rows, vocab]; see csrc/ops/sample.h.

        seeds, positions: int64 [rows]. settings: `pack_sampling`, on the device, in place of the four numbers.

        Returns:
            Tokens int32, their log-probabilities float32, and faults int32 (1 = a NaN logit, 2 = none is finite).
        """
        if not temperature >= 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1 or top_k < 0:
            raise ValueOutOfRangeError(
                f"sample: temperature {temperature}, top_k {top_k}, top_p {top_p}, min_p {min_p}; wanted temperature "
                "and top_k from 0 on, top_p in (0, 1], min_p in [0, 1]"
            )
        with self._call("sample", logits) as call:
            rows = logits.shape[0]
            tokens, faults = (
                torch.empty(rows, dtype=torch.int32, device=logits.device) for _ in range(2)
            )
            logprobs = logits.new_empty(rows)
            room = sample_room(self.module, rows, logits.device)
            self.module.sample(
                call.stream,
                call.rows("logits", logits, logits.shape[-1]),
                temperature,
                top_k,
                top_p,
                min_p,
                call.vector("seeds", seeds, rows, torch.int64),
                call.vector("positions", positions, rows, torch.int64),
                tokens.data_ptr(),
                logprobs.data_ptr(),
                faults.data_ptr(),
                room.data_ptr(),
                blocks_may_wait(),
                settings=call.vector("settings", settings, 4, torch.int32),
            )
        return tokens, logprobs, faults

    def _logits(
        self,
        h: Tensor,
        norm: Tensor,
        weight: Tensor,
        eps: float,
        index: Tensor | None,
        best: Tensor | None,
    ) -> Tensor:
        """best: int64 [rows], where keys of the largest ones go; None = they are not wanted."""
        with self._call("lm_head", h) as call:
            rows = h.shape[0] if index is None else index.shape[0]
            logits = h.new_empty(rows, weight.shape[0])
            self.module.lm_head(
                call.stream,
                call.rows("h", h, weight.shape[1], index),
                call.vector("norm", norm, weight.shape[1]),
                eps,
                call.matrix("weight", weight),
                logits.data_ptr(),
                call.vector("best", best, rows, torch.int64),
            )
        return logits

    def _mlp(
        self,
        op: str,
        y: Tensor,
        h: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        index: Tensor | None,
        live: Tensor | None,
        scale: Tensor | None,
        norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        gate, up, down = weights
        width, hidden = gate.shape
        if up.shape != gate.shape or tuple(down.shape) != (hidden, width):
            raise ShapeError(
                f"{op}: gate {list(gate.shape)}, up {list(up.shape)}, down {list(down.shape)}; wanted [w, d], [w, d], "
                "[d, w]"
            )
        with self._call(op, y) as call:
            rows = y.shape[0] if index is None else index.shape[0]
            activation = y.new_empty(rows, width)
            getattr(self.module, op)(
                call.stream,
                call.rows("y", y, hidden, index, live),
                call.rows("h", h, hidden, index, live),
                *(call.matrix(n, t) for n, t in zip(("gate", "up", "down"), weights, strict=True)),
                call.vector("scale", scale, rows),
                activation.data_ptr(),
                call.vector("norm", norm, hidden),
                eps,
            )
        return h


def cuda_ops() -> CudaOps:
    """The CUDA ops of this installation.

    Raises:
        UnsupportedError: built without CUDA, or no device to run on; the message says what to do.
    """
    from .cuda_device import cuda_module

    return CudaOps(cuda_module())
