"""Decoding: tokens per second against layers skipped, our dense pass and peers in the same run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flexidepth.metrics import available_memory_bytes
from flexidepth_ext.cuda_decode import Sampling
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.engine import Engine, KVCache
from flexidepth_ext.errors import OutOfMemoryError

from .ideal import step_bytes
from .options import Setting, places
from .peers.base import shorten
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
    """Engine.forward and Engine.sample, as generation calls them.

    caches: of at least `room` tokens each; cases of one depth and text can share them, because their first `depth`
    tokens are the same.
    """

    def __init__(self, engine: Engine, caches: Sequence[KVCache], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.engine, self.caches = engine, caches
        self.seeds, self.positions = (torch.zeros(self.batch, dtype=torch.int64) for _ in range(2))
        self.token = torch.full((self.batch,), FILLER, dtype=torch.int32)
        self.counts = [1] * self.batch

    def begin(self) -> None:
        for cache in self.caches:
            cache.truncate(min(cache.length, self.depth))
            self.fill(self.engine, cache)
        self.token.fill_(FILLER)

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
    caches: Sequence[KVCache] = (),
) -> DecodeCase:
    """Decode steps of `batch` sequences from `depth` tokens on.

    caches: on the CPU, those of `decode_caches`, which several cases may share.
    """
    arguments = plan, batch, depth, steps, text
    if isinstance(engine, CudaEngine):
        return _CudaCase(engine, *arguments)
    return _CpuCase(engine, caches or decode_caches(engine, batch, depth, steps), *arguments)


def decode_caches(engine: Engine, batch: int, depth: int, steps: int) -> list[KVCache]:
    """One for each sequence; OutOfMemoryError where the machine has no room for them."""
    config, room = engine.config, places(depth, steps)
    size = torch.empty((), dtype=engine.dtype).element_size()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    wanted, free = batch * room * token, available_memory_bytes()
    if free is not None and wanted > free:
        raise OutOfMemoryError(
            f"bench: {batch} sequences of {room} tokens need {wanted / 1e9:.1f} GB of keys and values; "
            f"{free / 1e9:.1f} GB are free; lower -b or -d"
        )
    return [engine.new_cache(room) for _ in range(batch)]


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
    read_samples: list[dict[str, Any]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[BenchRow]:
    """Rows for our dense pass, for each plan, and for each peer.

    On the CPU a block is timed once its caches are in the state in which such steps keep them (`bench.reads`), and mere
    reads of as many bytes are timed in turn with the steps.

    Args:
        steps: timed per case, spread over the rounds. setting: what the engine was made of, for the rows.
        bandwidth: GB/s that a device other than the CPU can read. spent: where the time went is added to it.
        read_samples: those of the mere reads are added to it, as plain values.

    Raises:
        OutOfMemoryError: keys and values that do not fit the memory.
    """
    block = -(-steps // rounds)
    where = setting or Setting("", "cpu", engine.dtype, getattr(engine, "num_threads", None))
    shared = {**where.fields(), "batch": batch, "kind": DECODE, "test": f"tg{steps} @ d{depth}"}
    caches: list[KVCache] = []
    reads, steady = None, 0
    if isinstance(engine, Engine):
        caches = decode_caches(engine, batch, depth, block)
        size = torch.empty((), dtype=engine.dtype).element_size()
        reads = Reads(engine.config, size, depth, engine.num_threads)
    cases = [
        decode_case(engine, plan, batch=batch, depth=depth, steps=block, text=text, caches=caches)
        for plan in (dense_plan(), *plans)
    ]
    dense_bytes = _bytes(cases[0], engine)
    if reads is not None:
        steady = steady_steps(dense_bytes)
    try:
        clock = alternate(
            [*cases, *peers, *(reads.cases if reads else ())],
            rounds=rounds,
            steps=steps,
            steady=steady,
            progress=progress,
        )
        if spent is not None:
            spent.add(clock)
        rows = [_own_row(shared, case, engine, dense_bytes, reads, bandwidth) for case in cases]
        if reads is not None and read_samples is not None:
            read_samples += [{**shared, **case.to_dict()} for case in reads.cases]
    finally:
        for cache in caches:
            cache.release()
        if reads is not None:
            reads.close()
    rows += [peer_row(shared, case, batch) for case in peers]
    return with_comparisons(rows)


def _own_row(
    shared: dict[str, Any],
    case: DecodeCase,
    engine: Engine | CudaEngine,
    dense_bytes: float,
    reads: Reads | None,
    bandwidth: float | None,
) -> BenchRow:
    """reads: what the CPU's memory gives; bandwidth: GB/s, what a device's does."""
    figures = timed(case.samples, case.batch)
    nbytes = _bytes(case, engine)
    gigabytes = nbytes / figures["ms_median"] / 1e6
    given = None if reads is None else nbytes / reads.milliseconds(nbytes) / 1e6
    limit = given or bandwidth
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
        given_noise=None if reads is None else reads.noise,
        work_share=gigabytes / limit if limit else None,
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
    """A row of a peer, whose bytes and layers are not ours to say; one without figures where it failed."""
    if case.failed:
        return BenchRow(**shared, name=case.name, peer=True, said=shorten(case.failed))
    return BenchRow(
        **shared,
        name=case.name,
        peer=True,
        said=case.note,
        **timed(case.samples, tokens),
        samples=case.samples,
        blocks=case.blocks,
    )
