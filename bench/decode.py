"""Decoding: tokens per second against layers skipped, our dense pass and peers in the same run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flexidepth_ext.cuda_decode import Sampling
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.engine import Engine

from .models import step_bytes
from .options import Setting, places
from .plans import Plan, dense_plan
from .reads import Reads, steady_steps
from .rows import DECODE, BenchRow, timed, with_comparisons
from .timing import Case, Spent, alternate

FILLER = 5  # any ordinary token


class DecodeCase(Case, ABC):
    """Sequences that decode side by side by one plan, greedily, each block from the same depth on.

    depth: tokens in the cache when a block begins. steps: most steps of a block, the warm-up not counted. text: ids of
    the first `depth` tokens, None = fillers. decided: uint8 [batch, routed layers] of each timed step.
    """

    def __init__(
        self, plan: Plan, batch: int, depth: int, steps: int, text: Sequence[int] | None
    ) -> None:
        super().__init__(plan.name, self.one_step, self.begin, after=self.keep, spins=False)
        self.plan, self.batch, self.depth = plan, batch, depth
        self.room = places(depth, steps)
        ids = list(text or [])[:depth]
        self.prefix = torch.tensor(ids + [FILLER] * (depth - len(ids)), dtype=torch.int32)
        self.masks = [plan.rows(batch, position) for position in range(depth, self.room)]
        self.decided: list[torch.Tensor] = []
        self._ran: torch.Tensor | None = None

    @abstractmethod
    def begin(self) -> None:
        """Prepare a block."""

    @abstractmethod
    def one_step(self) -> None:
        """One token of every sequence."""

    def keep(self) -> None:
        """Note what ran, outside the timing."""
        if self._ran is not None:
            self.decided.append(self._ran.clone())

    def fill(self, engine: Engine | CudaEngine, cache: Any) -> None:
        """The first `depth` tokens, as far as the cache lacks them, every layer run."""
        while cache.length < self.depth:
            piece = self.prefix[cache.length : cache.length + engine.max_rows]
            engine.forward(piece.clone(), [len(piece)], [cache], routing="dense")


class _CpuCase(DecodeCase):
    """Engine.forward and Engine.sample, as generation calls them."""

    def __init__(self, engine: Engine, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.engine = engine
        self.caches = [engine.new_cache(self.room) for _ in range(self.batch)]
        self.seeds, self.positions = (torch.zeros(self.batch, dtype=torch.int64) for _ in range(2))
        self.token = torch.full((self.batch,), FILLER, dtype=torch.int32)
        self.counts = [1] * self.batch

    def begin(self) -> None:
        for cache in self.caches:
            cache.truncate(min(cache.length, self.depth))
            self.fill(self.engine, cache)

    def one_step(self) -> None:
        result = self.engine.forward(
            self.token,
            self.counts,
            self.caches,
            routing=self.plan.mode,
            mask=self.masks[self.caches[0].length - self.depth],
            thresholds=self.plan.thresholds,
        )
        self._ran = result.ran
        self.token, _ = self.engine.sample(
            result.logits,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seeds=self.seeds,
            positions=self.positions,
        )


class _CudaCase(DecodeCase):
    """CudaEngine.decode with one step always in flight: a step is the time between two results."""

    def __init__(self, engine: CudaEngine, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.engine = engine
        self.caches: list[Any] = []
        self.run: Any = None
        self.launched = 0

    def begin(self) -> None:
        if self.run is not None:
            self.run.cancel()
        for cache in self.caches:
            cache.release()
        self.caches = [self.engine.new_cache(self.room) for _ in range(self.batch)]
        for cache in self.caches:
            self.fill(self.engine, cache)
        self.run = self.engine.decode(
            self.caches,
            [FILLER] * self.batch,
            Sampling(),
            seeds=[0] * self.batch,
            routing=self.plan.mode,
            thresholds=self.plan.thresholds,
        )
        self.launched = 0
        self._launch()

    def _launch(self) -> None:
        self.run.launch(self.masks[self.launched])
        self.launched += 1

    def one_step(self) -> None:
        self._launch()
        self._ran = self.run.collect().ran


def decode_case(
    engine: Engine | CudaEngine,
    plan: Plan,
    *,
    batch: int,
    depth: int,
    steps: int,
    text: Sequence[int] | None = None,
) -> DecodeCase:
    """Decode steps of `batch` sequences from `depth` tokens on."""
    arguments = plan, batch, depth, steps, text
    if isinstance(engine, CudaEngine):
        return _CudaCase(engine, *arguments)
    return _CpuCase(engine, *arguments)


def measure_decode(
    engine: Engine | CudaEngine,
    plans: Sequence[Plan],
    *,
    peers: Sequence[Case] = (),
    batch: int = 1,
    depth: int = 128,
    rounds: int = 5,
    steps: int = 120,
    text: Sequence[int] | None = None,
    setting: Setting | None = None,
    bandwidth: float | None = None,
    spent: Spent | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[BenchRow]:
    """Rows for our dense pass, for each plan, and for each peer.

    On the CPU a block is timed once its caches are in the state in which such steps keep them (`bench.reads`), and mere
    reads of as many bytes are timed in turn with the steps.

    Args:
        steps: timed per case, spread over the rounds. setting: what the engine was made of, for the rows.
        bandwidth: GB/s that a device other than the CPU can read. spent: where the time went is added to it.
    """
    block = -(-steps // rounds)
    cases = [
        decode_case(engine, plan, batch=batch, depth=depth, steps=block, text=text)
        for plan in (dense_plan(), *plans)
    ]
    dense_bytes = _bytes(cases[0], engine)
    reads, steady = None, 0
    if isinstance(engine, Engine):
        size = torch.empty((), dtype=engine.dtype).element_size()
        reads = Reads(engine.config, size, depth, engine.num_threads)
        steady = steady_steps(dense_bytes)
    others = [*peers, *(reads.cases if reads else ())]
    clock = alternate(
        [*cases, *others], rounds=rounds, steps=steps, steady=steady, progress=progress
    )
    if spent is not None:
        spent.add(clock)
    where = setting or Setting("", "cpu", engine.dtype, getattr(engine, "num_threads", None))
    shared = {**where.fields(), "batch": batch, "kind": DECODE, "test": f"tg{steps} @ d{depth}"}

    def gives(nbytes: float) -> float | None:
        return nbytes / reads.milliseconds(nbytes) / 1e6 if reads else bandwidth

    rows = [_own_row(shared, case, engine, dense_bytes, gives) for case in cases]
    rows += [peer_row(shared, case, batch) for case in peers]
    return with_comparisons(rows)


def _own_row(
    shared: dict[str, Any],
    case: DecodeCase,
    engine: Engine | CudaEngine,
    dense_bytes: float,
    gives: Callable[[float], float | None],
) -> BenchRow:
    """gives: GB/s that the memory gives a step of so many bytes."""
    figures = timed(case.samples, case.batch)
    nbytes = _bytes(case, engine)
    gigabytes = nbytes / figures["ms_median"] / 1e6
    given = gives(nbytes)
    dense = case.plan.asked is None
    got = None
    if not dense:
        got = engine.num_routed - float(torch.cat(case.decided).float().sum(1).mean())
    return BenchRow(
        **shared,
        name=case.name,
        skip_asked=case.plan.asked,
        skip_got=got,
        **figures,
        work=gigabytes,
        given=given,
        work_share=gigabytes / given if given else None,
        ideal=None if dense else dense_bytes / nbytes,
        samples=case.samples,
        blocks=case.blocks,
    )


def _bytes(case: DecodeCase, engine: Engine | CudaEngine) -> float:
    """Bytes that a step reads, in the mean over the very decisions."""
    size = torch.empty((), dtype=engine.dtype).element_size()

    def read(mask: torch.Tensor | None) -> float:
        return step_bytes(engine.config, mask, size, case.depth, case.batch)

    if case.plan.asked is None:
        return read(None)
    return sum(map(read, case.decided)) / len(case.decided)


def peer_row(shared: dict[str, Any], case: Case, tokens: int) -> BenchRow:
    """A row of a peer, whose bytes and layers are not ours to say."""
    return BenchRow(
        **shared,
        name=case.name,
        peer=True,
        **timed(case.samples, tokens),
        samples=case.samples,
        blocks=case.blocks,
    )
