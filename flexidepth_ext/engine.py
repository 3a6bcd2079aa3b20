"""The compiled engine behind tensors: checks once at the edge, then one call a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _C
from .errors import DtypeError, EngineClosedError, ValueOutOfRangeError
from .forward_arguments import ROUTING, Routing, check_forward, check_sampling
from .model_shape import DTYPES, shape_of

if TYPE_CHECKING:
    from flexidepth.config import FlexiDepthConfig


@dataclass(frozen=True)
class StepResult:
    """What one forward pass gives.

    logits: float32 [n, vocab], overwritten by the next pass (clone to keep).
    gates: float32 [rows, routed layers], NaN when routing is "dense".
    ran: uint8 [rows, routed layers], 1 where the layer ran.
    """

    logits: Tensor
    gates: Tensor
    ran: Tensor


class KVCache:
    """Keys and values of one sequence, grown page by page. Made by `Engine.new_cache`."""

    def __init__(self, native: _C.KVCache) -> None:
        self._native = native

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._native.length

    @property
    def max_length(self) -> int:
        """Tokens it may hold."""
        return self._native.max_length

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken so far."""
        return self._native.nbytes

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens and give whole pages behind them back."""
        self._native.truncate(length)

    def copy_from(self, other: KVCache) -> None:
        """Become a copy of `other`, a cache of the same model."""
        self._native.copy_from(other._native)

    def release(self) -> None:
        """Forget everything and give the memory back."""
        self._native.release()


class Engine:
    """Weights, threads and scratch memory of one model on the CPU.

    Args:
        config: sizes, routing and rope of the model.
        weights: (canonical name, tensor) pairs; consumed one by one, so that only one source tensor
            needs to be in memory. Missing, unexpected, misshapen and non-finite tensors raise.
        dtype: torch.bfloat16 or torch.float32, for matrices and cache. Norms, biases and the
            router are float32 in either case.
        num_threads: None = the processors that affinity mask and cgroup quota leave.
        max_rows: most tokens in one pass; scratch memory grows with it.
        strict_router: keep W_dec and W_head apart instead of folding them into one vector.
        isa: "generic", "avx2", "avx512", "avx512bf16" and "amx" (round activations to bfloat16 where weights are
            bfloat16) or None for the last of these that runs here (FLEXIDEPTH_ISA overrides).
    """

    def __init__(
        self,
        config: FlexiDepthConfig,
        weights: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        num_threads: int | None = None,
        max_rows: int = 256,
        strict_router: bool = False,
        isa: str | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise DtypeError(
                f"engine: dtype {dtype}; the CPU engine takes torch.float32 or torch.bfloat16"
            )
        threads = num_threads if num_threads is not None else _C.available_threads()
        if not 1 <= threads <= 1024:
            raise ValueOutOfRangeError(f"engine: num_threads is {threads}; 1 to 1024 are possible")
        if max_rows < 1:
            raise ValueOutOfRangeError(f"engine: max_rows is {max_rows}; at least 1 is needed")
        self.config = config
        self.dtype = dtype
        self.max_rows = max_rows
        self.vocab_size = int(config.vocab_size)
        self.num_routed = len(config.routing_layers)
        self._native = _C.Engine(
            shape_of(config, dtype, strict_router), threads, max_rows, isa or ""
        )
        for name, tensor in weights:
            self._set_weight(name, tensor)
        self._native.finish_loading()
        self._logits = torch.empty(0, self.vocab_size, device="cpu")

    def _set_weight(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in DTYPES:
            raise DtypeError(
                f"engine: {name} has dtype {tensor.dtype}; float32, bfloat16 or float16 weights are supported"
            )
        source = tensor.detach().contiguous()
        if name.endswith("router.head.weight"):
            source = source.reshape(-1)
        rows = source.shape[0]
        columns = source.shape[1] if source.dim() == 2 else 1
        self._native.set_weight(name, source.data_ptr(), DTYPES[source.dtype], rows, columns)

    @property
    def num_threads(self) -> int:
        """Threads that share the work of a pass."""
        return self._native.num_threads

    @property
    def isa(self) -> str:
        """Instruction set of the kernels in use."""
        return self._native.isa

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""
        return self._native.weight_bytes

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self._native.closed

    def new_cache(self, max_length: int) -> KVCache:
        """An empty cache for up to `max_length` tokens; memory is taken as tokens arrive."""
        limit = int(self.config.max_position_embeddings)
        if not 1 <= max_length <= limit:
            raise ValueOutOfRangeError(
                f"cache: max_length is {max_length}; this model has positions for 1 to {limit} tokens"
            )
        return KVCache(self._native.new_cache(max_length))

    def forward(
        self,
        token_ids: Tensor,
        counts: Sequence[int],
        caches: Sequence[KVCache],
        *,
        routing: Routing = "router",
        mask: Tensor | None = None,
        thresholds: Tensor | None = None,
        logits_rows: Tensor | None = None,
    ) -> StepResult:
        """Append tokens to their caches and compute logits.

        Args:
            token_ids: int32 [rows]; the first counts[0] belong to caches[0], and so on.
            counts: new tokens of each cache.
            caches: one per sequence, each listed once.
            routing: "router" (gate > threshold), "forced" (`mask` decides, the model's gates weigh),
                "forced_hard" (`mask` decides, weights 1), "dense" (all run, routers not evaluated).
            mask: uint8 [rows, routed layers], 1 = run; needed by the forced modes.
            thresholds: float32 [routed layers]; None = the configuration's.
            logits_rows: int32 [n] rows whose logits are wanted; None = the last row of each sequence.

        Raises:
            ValueOutOfRangeError: token id outside the vocabulary, cache full, too many rows.
            EngineBusyError: another thread is inside. EngineClosedError: after close().
        """
        rows = token_ids.shape[0]
        logits_rows = check_forward(
            token_ids, counts, routing, mask, thresholds, logits_rows, self.num_routed
        )
        num_logits = logits_rows.shape[0]
        if self._logits.shape[0] < num_logits:
            self._logits = torch.empty(num_logits, self.vocab_size, device="cpu")
        gates = torch.empty(rows, self.num_routed, device="cpu")
        ran = torch.empty(rows, self.num_routed, dtype=torch.uint8, device="cpu")
        self._native.forward(
            token_ids.data_ptr(),
            counts,
            [cache._native for cache in caches],
            rows,
            ROUTING[routing],
            0 if mask is None else mask.data_ptr(),
            0 if thresholds is None else thresholds.data_ptr(),
            logits_rows.data_ptr(),
            num_logits,
            self._logits.data_ptr(),
            gates.data_ptr(),
            ran.data_ptr(),
        )
        return StepResult(self._logits[:num_logits], gates, ran)

    def sample(
        self,
        logits: Tensor,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seeds: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Choose one token a row.

        Args:
            logits: float32 [rows, vocab]; -inf excludes a token.
            temperature: 0 = greedy (first of the largest logits).
            top_k: 0 = off. top_p: 1 = off. min_p: 0 = off. Semantics of transformers' filters.
            seeds: int64 [rows]; positions: int64 [rows], the counter of each draw: the same seed and
                position draw the same token whatever else is in the batch.

        Returns:
            tokens int32 [rows] and their log-probabilities float32 [rows] under softmax(logits).
        """
        if self.closed:
            raise EngineClosedError("engine: sample after close()")
        check_sampling(logits, temperature, top_k, top_p, min_p, seeds, positions)
        rows, vocab = logits.shape
        tokens = torch.empty(rows, dtype=torch.int32, device="cpu")
        logprobs = torch.empty(rows, device="cpu")
        self._native.sample(
            logits.data_ptr(),
            rows,
            vocab,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds.data_ptr(),
            positions.data_ptr(),
            tokens.data_ptr(),
            logprobs.data_ptr(),
        )
        return tokens, logprobs

    def record_times(self, on: bool = True) -> None:
        """From now on count where the time of passes goes, beginning at 0; or stop."""
        self._native.record_times(on)

    def times(self) -> dict[str, float]:
        """Seconds of the recorded passes by part: inputs (norm, [Q or router; K; V], cache), gate, queries, attention,
        output, feed_forward, adapter, head, other; those of routed layers begin with "routed."."""
        return dict(self._native.times())

    def close(self) -> None:
        """Give the memory of weights and scratch back at once. Calling it twice is fine."""
        if not self.closed:
            self._native.close()
            self._logits = torch.empty(0, self.vocab_size, device="cpu")
