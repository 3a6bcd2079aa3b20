"""Decoding without the host: a token is one graph, and the host reads one step behind.

A graph holds a whole step, from the embedding to the draw and to the next position. Everything that changes between
steps or runs (tokens, positions, page tables, thresholds, masks, how a token is drawn) lies in device memory that the
graph reads, so a graph is captured once for each number of sequences, each doubling of the context and each way to
route, its pass in the fastest of its forms (cuda_choice.py).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cuda_cache import PAGE_TOKENS, CudaKVCache
from .cuda_choice import PassChoice, PassForm, blocks_may_wait, measure
from .cuda_tensors import pack_sampling, sample_room
from .errors import ShapeError, ValueOutOfRangeError
from .forward_arguments import ROUTING

if TYPE_CHECKING:
    from .cuda_engine import CudaEngine
    from .cuda_runtime import Graph

RING = 4  # steps whose results the host may still have to read
_MOST_GRAPHS = 16
# temperature, top_k, top_p and min_p of a launch that finds them in device memory
_UNREAD = (0.0, 0, 1.0, 0.0)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; see csrc/ops/sample.h."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def packed(self, vocab: int) -> Tensor:
        """For the kernel."""
        return pack_sampling(self.temperature, self.top_k, self.top_p, self.min_p, vocab)


@dataclass(frozen=True)
class DecodeStep:
    """What one step chose.

    tokens, logprobs: one a sequence. gates: float32 [sequences, routed layers] of the tokens that were computed, NaN
    when every layer runs. ran: uint8, likewise.
    """

    tokens: list[int]
    logprobs: list[float]
    gates: Tensor
    ran: Tensor


class _Uncaptured:
    """Launches that are made anew each time: those of a graph cannot be waited for one by one."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.replay = launch


class DecodeState:
    """Buffers of so many sequences, and the graphs that use them."""

    def __init__(self, engine: CudaEngine, rows: int) -> None:
        # The engine has its states; a cycle would keep both in memory until the collector comes.
        self.engine: CudaEngine = weakref.proxy(engine)
        self.rows = rows
        device, host, routed = engine.device, engine.runtime.host, engine.num_routed
        i32, i64, f32, u8 = torch.int32, torch.int64, torch.float32, torch.uint8

        def room(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = room(rows, dtype=i32)  # taken by a step, and replaced by what it draws
        self.positions, self.draws, self.seeds, self.tables = (
            room(rows, dtype=i64) for _ in range(4)
        )
        self.sequences = torch.arange(rows, dtype=i32, device=device)
        self.step = room(1, dtype=i64)
        self.thresholds, self.mask = room(routed, dtype=f32), room(rows, routed, dtype=u8)
        self.logits = room(rows, engine.vocab_size, dtype=f32)
        self.sampling = room(4, dtype=i32)
        self.logprobs, self.faults = room(rows, dtype=f32), room(rows, dtype=i32)
        self.sample_room = sample_room(engine.runtime.module, rows, device)
        self.gates, self.ran = room(rows, routed, dtype=f32), room(rows, routed, dtype=u8)
        self.ring_tokens, self.ring_faults = (host(RING, rows, dtype=i32) for _ in range(2))
        self.ring_logprobs = host(RING, rows, dtype=f32)
        self.ring_gates = host(RING, rows, routed, dtype=f32)
        self.ring_ran = host(RING, rows, routed, dtype=u8)
        self.host_masks = [host(rows, routed, dtype=u8) for _ in range(RING)]
        self.last_mask: Tensor | None = None  # what `mask` holds once all that was queued is done
        self._graphs: OrderedDict[tuple[int, int, int], Graph] = OrderedDict()
        self.choices: dict[tuple[int, int], PassChoice] = {}  # by pages and way to route

    def take_mask(self, mask: Tensor, slot: int) -> None:
        """Queue a copy of the step's mask, unless it is the one before. slot: of the ring, no longer read."""
        if self.last_mask is not None and torch.equal(self.last_mask, mask):
            return
        pinned = self.host_masks[slot]
        pinned.copy_(mask)
        self.mask.copy_(pinned, non_blocking=True)
        self.last_mask = pinned

    def graph(self, pages: int, routing: int) -> Graph:
        """The step over a context of up to `pages` pages, rounded up to a power of two."""
        bucket = min(1 << (pages - 1).bit_length(), self.engine.decode_scratch.pages)
        key = bucket, routing, self.engine.prefetch_bytes
        if self.engine.check:
            return _Uncaptured(lambda: self._launch(bucket, routing, self.engine.plain_form))
        if key not in self._graphs:
            form = self._chosen(bucket, routing)
            # A capture may run the step to load its kernels, and a run moves everything on.
            kept = [self.tokens, self.positions, self.draws, self.step]
            before = [tensor.clone() for tensor in kept]
            try:
                self._graphs[key] = self.engine.runtime.capture(
                    lambda: self._launch(bucket, routing, form)
                )
            finally:  # also where the graph is refused after that run: nothing has been queued then
                for tensor, value in zip(kept, before, strict=True):
                    tensor.copy_(value)
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _chosen(self, pages: int, routing: int) -> PassForm:
        """The pass's form. Measured on what the step is about to compute: it writes the same again."""
        engine, key = self.engine, (pages, routing)
        if len(engine.forms) == 1:
            return engine.plain_form
        if key not in self.choices:
            (name,) = (n for n, number in ROUTING.items() if number == routing)
            self.choices[key] = measure(
                engine.runtime,
                engine.forms,
                lambda form: self._launch_pass(pages, routing, form),
                lambda: [t.to("cpu", copy=True) for t in (self.logits, self.gates, self.ran)],
                self.rows,
                pages,
                name,
            )
        return self.choices[key].chosen

    def _launch_pass(self, pages: int, routing: int, form: PassForm) -> None:
        engine = self.engine
        engine.native.run(
            engine.runtime.stream,
            self.rows,
            False,
            self.tokens.data_ptr(),
            self.positions.data_ptr(),
            self.sequences.data_ptr(),
            self.tables.data_ptr(),
            pages,
            routing,
            self.mask.data_ptr(),
            self.thresholds.data_ptr(),
            0,
            self.rows,
            self.logits.data_ptr(),
            self.gates.data_ptr(),
            self.ran.data_ptr(),
            *engine.decode_scratch.arguments(),
            engine.prefetch_bytes,
            form is PassForm.OVERLAP,
            engine.check,
            form is PassForm.PERSISTENT,
        )

    def _launch(self, pages: int, routing: int, form: PassForm) -> None:
        engine, module = self.engine, self.engine.runtime.module
        stream, rows = engine.runtime.stream, self.rows
        self._launch_pass(pages, routing, form)
        module.sample(
            stream,
            module.Rows(self.logits.data_ptr(), rows, engine.vocab_size),
            *_UNREAD,
            self.seeds.data_ptr(),
            self.draws.data_ptr(),
            self.tokens.data_ptr(),
            self.logprobs.data_ptr(),
            self.faults.data_ptr(),
            self.sample_room.data_ptr(),
            blocks_may_wait(),
            engine.check,
            self.sampling.data_ptr(),
        )
        read = self.tokens, self.logprobs, self.faults, self.gates, self.ran
        moved = self.positions, self.draws, self.step
        ring = (
            self.ring_tokens,
            self.ring_logprobs,
            self.ring_faults,
            self.ring_gates,
            self.ring_ran,
        )
        module.advance(
            stream,
            rows,
            engine.num_routed,
            *(t.data_ptr() for t in (*read, *moved)),
            RING,
            *(t.data_ptr() for t in ring),
            engine.check,
        )


class DecodeRun:
    """Made by `CudaEngine.decode`: `launch` queues a step, `collect` gives the oldest one's results.

    A run holds its engine's buffers for so many sequences: it ends where the next one begins.
    """

    def __init__(
        self,
        engine: CudaEngine,
        state: DecodeState,
        caches: Sequence[CudaKVCache],
        token_ids: Tensor,
        sampling: Sampling,
        seeds: Sequence[int],
        routing: str,
        thresholds: Tensor | None,
    ) -> None:
        if len(seeds) != len(caches):
            raise ShapeError(f"engine: {len(seeds)} seeds for {len(caches)} sequences")
        self._engine, self._state, self._caches = engine, state, list(caches)
        self._routing = ROUTING[routing]
        self._forced = routing in ("forced", "forced_hard")
        self._queued: deque[Callable[[], None]] = deque()
        self._launched = self._collected = 0
        self._forgotten: set[int] = set()
        lengths = torch.tensor([cache.length for cache in caches], dtype=torch.int64, device="cpu")
        state.tokens.copy_(token_ids)
        state.positions.copy_(lengths)
        state.draws.copy_(lengths + 1)
        state.sampling.copy_(sampling.packed(engine.vocab_size))
        state.seeds.copy_(torch.tensor(list(seeds), dtype=torch.int64, device="cpu"))
        state.tables.copy_(torch.tensor([cache.table.data_ptr() for cache in caches], device="cpu"))
        state.thresholds.copy_(engine.thresholds if thresholds is None else thresholds)
        state.step.zero_()
        if routing == "dense":
            state.gates.fill_(torch.nan)
            state.ran.fill_(1)

    @property
    def in_flight(self) -> int:
        """Steps that were launched and not collected."""
        return len(self._queued)

    def launch(self, mask: Tensor | None = None) -> None:
        """Queue one step of every sequence.

        Args:
            mask: uint8 [sequences, routed layers], which of them run; for forced routing.

        Raises:
            ValueOutOfRangeError: a full cache. OutOfMemoryError: no memory for another page; nothing has been queued
                then, and what is in flight can be collected.
        """
        engine, state = self._engine, self._state
        if self.in_flight >= RING - 1:
            raise ValueOutOfRangeError(
                f"engine: {self.in_flight} steps are in flight; collect one before the next"
            )
        if self._forgotten:
            raise ValueOutOfRangeError("engine: a sequence of this run is over; begin another run")
        if self._forced and (mask is None or mask.shape != state.mask.shape):
            raise ShapeError(
                f"engine: forced routing needs a mask {list(state.mask.shape)} of every step"
            )
        with engine.exclusive("decode"):
            for cache in self._caches:
                cache.reserve(cache.length + 1)
            with engine.memory_errors("decode"), engine.runtime.active():
                if mask is not None:
                    state.take_mask(mask, self._launched % RING)
                pages = max(cache.length for cache in self._caches) // PAGE_TOKENS + 1
                state.graph(pages, self._routing).replay()
                self._queued.append(engine.runtime.mark())
            self._launched += 1
            for cache in self._caches:
                cache.advance(1)

    def collect(self) -> DecodeStep:
        """Wait for the oldest step in flight. Raises ValueOutOfRangeError where its logits had nothing to choose."""
        if not self._queued:
            raise ValueOutOfRangeError("engine: no step is in flight; launch one before collecting")
        with self._engine.exclusive("decode"):
            self._queued.popleft()()
            slot, state = self._collected % RING, self._state
            self._collected += 1
            check_faults(state.ring_faults[slot])
            return DecodeStep(
                state.ring_tokens[slot].tolist(),
                state.ring_logprobs[slot].tolist(),
                state.ring_gates[slot].clone(),
                state.ring_ran[slot].clone(),
            )

    def forget(self, sequence: int) -> None:
        """Take what is in flight back out of a sequence's cache, which is over: nobody wants it."""
        if sequence in self._forgotten:
            return
        self._forgotten.add(sequence)
        cache = self._caches[sequence]
        cache.truncate(max(0, cache.length - self.in_flight))

    def cancel(self) -> None:
        """Wait for what is in flight and forget it, for every sequence."""
        for number in range(len(self._caches)):
            self.forget(number)
        while self._queued:
            self._queued.popleft()()


def check_faults(faults: Tensor) -> None:
    """Raise for rows of logits that nothing could be drawn from; faults: of csrc/ops/sample.h."""
    for row, fault in enumerate(faults.tolist()):
        if fault:
            what = "a NaN" if fault == 1 else "no finite value"
            raise ValueOutOfRangeError(f"sample: row {row} of the logits has {what}")
