"""The engine on an NVIDIA device: the interface of `engine.Engine`, weights and cache in device memory."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cuda_cache import PAGE_TOKENS, CudaKVCache
from .cuda_choice import PassChoice, PassForm, blocks_may_wait, may_pay, open_forms
from .cuda_decode import DecodeRun, DecodeState, Sampling, check_faults
from .cuda_prompt import PromptPass, PromptRouting, PromptRows, torch_multiplies
from .cuda_runtime import CudaRuntime, Runtime
from .cuda_tensors import sample_room
from .cuda_weights import load_weights
from .engine import StepResult
from .errors import (
    DtypeError,
    EngineBusyError,
    EngineClosedError,
    OutOfMemoryError,
    ShapeError,
    UnsupportedError,
    ValueOutOfRangeError,
)
from .forward_arguments import ROUTING, Routing, check_filters, check_forward, check_sampling
from .model_shape import DTYPES, shape_of

if TYPE_CHECKING:
    from flexidepth.config import FlexiDepthConfig

MAX_DECODE_ROWS = 8  # sequences of a decoding step
_MAX_HEAD_DIM = 128
_OWN_ROWS = 64  # rows beyond which torch multiplies: what our kernels take at a time
_MAX_ROWS = 65535  # of a grid's last axis
_PROMPT_SCRATCH = 256 << 20  # bytes that a prompt's scratch may take, if 8 rows fit


class Scratch:
    """Buffers of passes of up to so many rows and pages."""

    def __init__(self, engine: CudaEngine, rows: int, pages: int, prompt: bool) -> None:
        self.rows, self.pages = rows, pages
        count = engine.native.scratch_bytes(rows, pages, prompt)
        self.memory = torch.zeros(count, dtype=torch.uint8, device=engine.runtime.device)

    def arguments(self) -> tuple[int, int, int]:
        """For CudaPass.run."""
        return self.memory.data_ptr(), self.rows, self.pages


class CudaEngine:
    """Weights, cache and buffers of one model on a device.

    Args:
        config: sizes, routing and rope of the model.
        weights: (canonical name, tensor) pairs, consumed one by one. Missing, unexpected, misshapen and non-finite
            tensors raise.
        dtype: torch.bfloat16, torch.float16 or torch.float32, for matrices and cache. Norms, biases and the router
            are float32.
        max_rows: most tokens in one pass; scratch memory grows with it, up to 256 MB for prompts.
        max_length: most tokens of a sequence; None = the model's positions.
        strict_router: keep W_dec and W_head apart instead of folding them into one vector.
        overlap: whether the kernels of passes that are many of our own begin while those before them end (programmatic
            dependent launch; never where the device cannot: from compute capability 9.0 on); None = as
            FLEXIDEPTH_CUDA_OVERLAP says, 0 or 1, and without it as measured, for graphs.
        prefetch_kb: KiB of each routed layer's weights that decoding brings into the L2 cache before it is decided
            whether they are needed; None = FLEXIDEPTH_CUDA_PREFETCH_KB, or 0.
        check: wait for each kernel, so that an error names the op that it is of; slow. None = whether
            FLEXIDEPTH_CUDA_DEBUG is 1.
        persistent: whether passes of up to 8 rows, one a sequence, are one kernel instead of many; None = as
            FLEXIDEPTH_CUDA_PERSISTENT says, 0 or 1, and without it as measured, for graphs of models that are small
            enough (cuda_choice.py). In any form the results are the same bits.
        runtime: of the device; None = the current CUDA device's.

    Raises:
        UnsupportedError: no CUDA here, a head_dim that the kernels do not have, or persistent passes with a strict
            router. OutOfMemoryError.
    """

    def __init__(
        self,
        config: FlexiDepthConfig,
        weights: Iterable[tuple[str, Tensor]],
        *,
        dtype: torch.dtype,
        max_rows: int = 2048,
        max_length: int | None = None,
        strict_router: bool = False,
        overlap: bool | None = None,
        prefetch_kb: int | None = None,
        check: bool | None = None,
        persistent: bool | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise DtypeError(
                f"engine: dtype {dtype}; the CUDA engine takes torch.bfloat16, torch.float16 or torch.float32"
            )
        if not 1 <= max_rows <= _MAX_ROWS:
            raise ValueOutOfRangeError(f"engine: max_rows is {max_rows}; wanted 1 to {_MAX_ROWS}")
        if config.head_dim % 8 or config.head_dim > _MAX_HEAD_DIM:
            raise UnsupportedError(
                f"engine: head_dim is {config.head_dim}; the CUDA kernels take multiples of 8 up to {_MAX_HEAD_DIM}, "
                "use device='cpu'"
            )
        self.runtime = CudaRuntime() if runtime is None else runtime
        self.forms = open_forms(
            overlap,
            persistent,
            can_overlap=self.runtime.can_overlap,
            strict_router=strict_router,
        )
        self.config, self.dtype, self.max_rows = config, dtype, max_rows
        positions = int(config.max_position_embeddings)
        self.max_length = min(max_length or positions, positions)
        self.own_rows = _OWN_ROWS
        self.vocab_size = int(config.vocab_size)
        self.num_routed = len(config.routing_layers)
        self.strict_router = strict_router
        self.prefetch_bytes = _prefetch_bytes(prefetch_kb)
        self.check = os.environ.get("FLEXIDEPTH_CUDA_DEBUG") == "1" if check is None else check
        self._lock = threading.Lock()
        self._closed = False
        self._head_bytes = config.head_dim * torch.empty((), dtype=dtype).element_size()
        # Kernels that are queued write to pinned memory, which must not go before they end.
        weakref.finalize(self, self.runtime.synchronize)
        self.runtime.follow()
        with self.memory_errors("load the model"), self.runtime.active():
            device = self.runtime.device
            self.inv_freq = torch.tensor(config.rope_inv_freq(), dtype=torch.float32, device=device)
            self.native = self.runtime.module.CudaPass(
                shape_of(config, dtype, strict_router), self.inv_freq.data_ptr()
            )
            self.router_biases = [0.0] * self.num_routed
            self.weights = load_weights(self, weights)
            self.runtime.synchronize()  # the caller's tensors are no longer read
            self.thresholds = torch.tensor(
                [float(t) for t in config.router_thresholds], dtype=torch.float32, device=device
            )
            pages = -(-self.max_length // PAGE_TOKENS)
            self.decode_scratch = Scratch(self, MAX_DECODE_ROWS, pages, prompt=False)
            self._prompt_scratch = Scratch(self, self._rows_at_once(pages), pages, prompt=True)
        self.native.finish_loading()
        self._layer_table: Tensor | None = None
        nbytes = {name: tensor.nbytes for name, tensor in self.weights.items()}
        if len(self.forms) > 1 and not may_pay(nbytes):
            self.forms = [form for form in self.forms if form is not PassForm.PERSISTENT]
        if PassForm.PERSISTENT in self.forms:
            self._set_layer_table()
        self._decoding: dict[int, DecodeState] = {}  # by number of sequences

    def _set_layer_table(self) -> None:
        """Where each layer's weights are, for the persistent kernel, on the device."""
        table = torch.empty(self.native.layer_table_bytes, dtype=torch.uint8, device="cpu")
        self.native.write_layer_table(table.data_ptr())
        with self.memory_errors("load the model"), self.runtime.active():
            self._layer_table = table.to(self.device)
            self.runtime.synchronize()
        self.native.set_layer_table(self._layer_table.data_ptr())

    @property
    def device(self) -> torch.device:
        """Where weights and cache are."""
        return self.runtime.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in device memory."""
        return sum(tensor.nbytes for tensor in self.weights.values())

    @property
    def plain_form(self) -> PassForm:
        """The form of passes outside graphs: the only one, or the plainest."""
        return self.forms[0]

    @property
    def pass_choices(self) -> list[PassChoice]:
        """What was measured so far to choose among the forms of decoding passes."""
        return [choice for state in self._decoding.values() for choice in state.choices.values()]

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self._closed

    def new_cache(self, max_length: int) -> CudaKVCache:
        """An empty cache for up to `max_length` tokens; memory is taken as tokens arrive."""
        if self._closed:
            raise EngineClosedError("engine: new_cache after close()")
        if not 1 <= max_length <= self.max_length:
            raise ValueOutOfRangeError(
                f"cache: max_length is {max_length}; this model was loaded for 1 to {self.max_length} tokens"
            )
        with self.memory_errors("make a cache"):
            return CudaKVCache(self.runtime, self.native.page_bytes, self._head_bytes, max_length)

    def forward(
        self,
        token_ids: Tensor,
        counts: Sequence[int],
        caches: Sequence[CudaKVCache],
        *,
        routing: Routing = "router",
        mask: Tensor | None = None,
        thresholds: Tensor | None = None,
        logits_rows: Tensor | None = None,
    ) -> StepResult:
        """Append tokens to their caches and compute logits; see `engine.Engine.forward`.

        Arguments and results are in host memory. A row's bits do not depend on which rows are beside it, but, in half
        precision, on whether it is among up to 8 rows, up to 64 or more; beyond 64 torch multiplies, by a library that
        chooses its ways by the number of rows.
        """
        with self.exclusive("forward"):
            wanted = check_forward(
                token_ids, counts, routing, mask, thresholds, logits_rows, self.num_routed
            )
            self._check_batch(token_ids, counts, caches, routing, mask, wanted)
            for cache, count in zip(caches, counts, strict=True):
                cache.reserve(cache.length + count)
            with self.memory_errors("run a pass"), self.runtime.active():
                result = self._run(token_ids, counts, caches, routing, mask, thresholds, wanted)
            for cache, count in zip(caches, counts, strict=True):
                cache.advance(count)
        return result

    def _run(
        self,
        token_ids: Tensor,
        counts: Sequence[int],
        caches: Sequence[CudaKVCache],
        routing: str,
        mask: Tensor | None,
        thresholds: Tensor | None,
        logits_rows: Tensor,
    ) -> StepResult:
        device, rows = self.device, token_ids.shape[0]
        positions = torch.cat(
            [
                torch.arange(c.length, c.length + n, device="cpu")
                for c, n in zip(caches, counts, strict=True)
            ]
        )
        sequences = torch.arange(len(caches), dtype=torch.int32, device="cpu").repeat_interleave(
            torch.tensor(counts, device="cpu")
        )
        tables = torch.tensor([cache.table.data_ptr() for cache in caches], device=device)
        pages = int(positions.max()) // PAGE_TOKENS + 1
        prompt = rows > len(caches) or rows > MAX_DECODE_ROWS
        scratch = self._prompt_scratch if prompt else self.decode_scratch
        by_torch = torch_multiplies(self, rows)
        parts = []  # what each piece gave, and which of the wanted logits are its own
        for start in range(0, rows, rows if by_torch else scratch.rows):
            piece = slice(start, start + (rows if by_torch else scratch.rows))
            own = ((logits_rows >= start) & (logits_rows < piece.stop)).nonzero().flatten()
            wanted = (logits_rows[own] - start).to(device)
            ids, places, numbers = (t[piece].to(device) for t in (token_ids, positions, sequences))
            batch = PromptRows(ids, places, numbers, tables, pages)
            forced = None if mask is None or not mask.numel() else mask[piece].to(device)
            if by_torch:
                part = self._pass_of_torch(batch, routing, forced, thresholds, wanted)
            else:
                part = self._own_pass(batch, scratch, prompt, routing, forced, thresholds, wanted)
            parts.append((own, part))
        if len(parts) == 1:
            return parts[0][1]
        logits = torch.empty(logits_rows.shape[0], self.vocab_size, device="cpu")
        for own, part in parts:
            logits[own] = part.logits
        gates, ran = (torch.cat([getattr(p, name) for _, p in parts]) for name in ("gates", "ran"))
        return StepResult(logits, gates, ran)

    def _decisions(self, rows: int) -> tuple[Tensor, Tensor]:
        """Gates and decisions [rows, routed layers] of a pass, as they stay where every layer runs."""
        shape, device = (rows, self.num_routed), self.device
        gates = torch.full(shape, torch.nan, dtype=torch.float32, device=device)
        return gates, torch.ones(shape, dtype=torch.uint8, device=device)

    def _pass_of_torch(
        self,
        batch: PromptRows,
        routing: str,
        forced: Tensor | None,
        thresholds: Tensor | None,
        wanted: Tensor,
    ) -> StepResult:
        chosen = self.config.router_thresholds if thresholds is None else thresholds.tolist()
        gates, ran = self._decisions(len(batch.token_ids))
        passing = PromptPass(
            self, batch, PromptRouting(routing, forced, [float(t) for t in chosen], gates, ran)
        )
        passing.run()
        return StepResult(passing.logits(wanted).cpu(), gates.cpu(), ran.cpu())

    def _own_pass(
        self,
        batch: PromptRows,
        scratch: Scratch,
        prompt: bool,
        routing: str,
        forced: Tensor | None,
        thresholds: Tensor | None,
        wanted: Tensor,
    ) -> StepResult:
        # Inputs live until the copies of the results, which wait for the kernels, are done.
        rows, device = len(batch.token_ids), self.device
        taus = self.thresholds if thresholds is None else thresholds.to(device)
        gates, ran = self._decisions(rows)
        logits = torch.empty(len(wanted), self.vocab_size, dtype=torch.float32, device=device)
        self.native.run(
            self.runtime.stream,
            rows,
            prompt,
            batch.token_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.sequences.data_ptr(),
            batch.tables.data_ptr(),
            batch.max_pages,
            ROUTING[routing],
            0 if forced is None else forced.data_ptr(),
            taus.data_ptr(),
            wanted.data_ptr(),
            logits.shape[0],
            logits.data_ptr(),
            gates.data_ptr(),
            ran.data_ptr(),
            *scratch.arguments(),
            self.prefetch_bytes,
            self.plain_form is PassForm.OVERLAP,
            self.check,
            self.plain_form is PassForm.PERSISTENT and not prompt,
        )
        return StepResult(logits.cpu(), gates.cpu(), ran.cpu())

    def _rows_at_once(self, pages: int) -> int:
        """Rows of a prompt that our own kernels take at a time. Beyond 64 of half precision torch multiplies; of
        float32 the scratch decides, since attention's grows with rows times pages."""
        if self.dtype != torch.float32:
            return min(self.max_rows, self.own_rows)
        eight: int = self.native.scratch_bytes(8, pages, True)
        return min(self.max_rows, 8 * max(1, _PROMPT_SCRATCH // eight))

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
        """Choose one token a row, on the device; see `engine.Engine.sample`."""
        with self.exclusive("sample"):
            check_sampling(logits, temperature, top_k, top_p, min_p, seeds, positions)
            rows, vocab = logits.shape
            with self.memory_errors("choose tokens"), self.runtime.active():
                device = self.device
                moved, own, places = (t.to(device) for t in (logits, seeds, positions))
                tokens, faults = (
                    torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2)
                )
                logprobs = torch.empty(rows, dtype=torch.float32, device=device)
                module = self.runtime.module
                room = sample_room(module, rows, device)  # until the kernel has ended
                module.sample(
                    self.runtime.stream,
                    module.Rows(moved.data_ptr(), rows, vocab),
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    own.data_ptr(),
                    places.data_ptr(),
                    tokens.data_ptr(),
                    logprobs.data_ptr(),
                    faults.data_ptr(),
                    room.data_ptr(),
                    blocks_may_wait(),
                )
                check_faults(faults.cpu())
                return tokens.cpu(), logprobs.cpu()

    def decode(
        self,
        caches: Sequence[CudaKVCache],
        token_ids: Sequence[int],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        routing: Routing = "router",
        thresholds: Tensor | None = None,
    ) -> DecodeRun:
        """Sequences that decode side by side without waiting for the host; each goes on from its token.

        Args:
            caches: of at most 8 sequences, each listed once.
            token_ids: one a sequence, the last that was chosen and not computed yet.
            seeds: one a sequence; a draw's counter is the place of the new token, as `sample` is given it.
            thresholds: float32 [routed layers]; None = the configuration's.
        """
        with self.exclusive("decode"):
            ids = torch.tensor(token_ids, dtype=torch.int32, device="cpu")
            ones = [1] * len(caches)
            rows = check_forward(ids, ones, routing, None, thresholds, None, self.num_routed)
            self._check_batch(ids, ones, caches, "router", None, rows)
            check_filters(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
            if len(caches) > MAX_DECODE_ROWS:
                raise ValueOutOfRangeError(
                    f"engine: {len(caches)} sequences decode side by side; at most {MAX_DECODE_ROWS} can"
                )
            with self.memory_errors("decode"), self.runtime.active():
                state = self._decoding.get(len(caches)) or DecodeState(self, len(caches))
                self._decoding[len(caches)] = state
                return DecodeRun(self, state, caches, ids, sampling, seeds, routing, thresholds)

    def close(self) -> None:
        """Give the memory of weights and scratch back at once. Calling it twice is fine."""
        if self._closed:
            return
        with self.exclusive("close"):
            self.runtime.synchronize()
            self._closed = True
            self.weights.clear()
            self._decoding.clear()
            self._layer_table = None
            del self.decode_scratch, self._prompt_scratch, self.thresholds, self.inv_freq
            self.runtime.give_back()

    @contextmanager
    def exclusive(self, what: str) -> Iterator[None]:
        """Raise EngineBusyError while another thread is inside, EngineClosedError after close()."""
        if not self._lock.acquire(blocking=False):
            raise EngineBusyError(
                "engine: another thread is using this engine; one engine serves one thread at a time"
            )
        try:
            if self._closed:
                raise EngineClosedError(f"engine: {what} after close()")
            yield
        finally:
            self._lock.release()

    @contextmanager
    def memory_errors(self, what: str) -> Iterator[None]:
        """Turn the device's lack of memory into OutOfMemoryError; what is made within is for any mode of torch."""
        try:
            with torch.inference_mode(False):
                yield
        except RuntimeError as error:
            # Graphs and pinned memory have other types of error than tensors do.
            if "out of memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise OutOfMemoryError(
                f"engine: the device has no memory to {what} ({self.runtime.free_bytes() / 1e9:.2f} GB are free); "
                "load a smaller dtype, lower max_rows, or release caches"
            ) from error

    def _check_batch(
        self,
        token_ids: Tensor,
        counts: Sequence[int],
        caches: Sequence[CudaKVCache],
        routing: str,
        mask: Tensor | None,
        logits_rows: Tensor,
    ) -> None:
        rows = token_ids.shape[0]
        if not 0 < rows <= self.max_rows:
            raise ValueOutOfRangeError(
                f"engine: {rows} rows in one pass; 1 to {self.max_rows} are possible, cut the prompt into chunks"
            )
        if len(counts) != len(caches):
            raise ShapeError(f"engine: {len(counts)} counts for {len(caches)} caches")
        for i, (count, cache) in enumerate(zip(counts, caches, strict=True)):
            if count < 1:
                raise ValueOutOfRangeError(
                    f"engine: sequence {i} brings {count} tokens; at least one is needed"
                )
            if any(cache is other for other in caches[:i]):
                raise ValueOutOfRangeError(
                    f"engine: the cache of sequence {i} is listed twice; each sequence needs its own"
                )
            if not cache.fits(self.runtime, self.native.page_bytes):
                raise ShapeError(
                    f"engine: the cache of sequence {i} belongs to another model; make it with this engine's "
                    "new_cache()"
                )
        if sum(counts) != rows:
            raise ShapeError(f"engine: {rows} token ids but counts add up to {sum(counts)}")
        outside = (token_ids < 0) | (token_ids >= self.vocab_size)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueOutOfRangeError(
                f"engine: token id {int(token_ids[row])} at row {row}; the vocabulary is 0..{self.vocab_size - 1}"
            )
        if logits_rows.shape[0] > rows or bool(((logits_rows < 0) | (logits_rows >= rows)).any()):
            raise ValueOutOfRangeError(
                f"engine: logits rows {logits_rows.tolist()[:8]} asked of {rows} rows"
            )
        if routing in ("forced", "forced_hard") and mask is None and self.num_routed:
            raise ValueOutOfRangeError("engine: forced routing needs a mask [rows, routed layers]")


def _prefetch_bytes(kb: int | None) -> int:
    text = os.environ.get("FLEXIDEPTH_CUDA_PREFETCH_KB", "0") if kb is None else str(kb)
    if not text.isdecimal():
        raise ValueOutOfRangeError(
            f"engine: {text!r} KiB to prefetch (prefetch_kb, FLEXIDEPTH_CUDA_PREFETCH_KB); wanted a whole number from "
            "0 on"
        )
    return 1024 * int(text)
