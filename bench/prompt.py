"""Prompts: time against the share of routed layers skipped, beside the ratio of arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.engine import Engine

from .decode import peer_row
from .ideal import flops_of_prompt
from .options import Setting
from .plans import Plan, dense_plan
from .rows import PROMPT, BenchRow, timed, with_comparisons
from .timing import Case, Spent, alternate

_SEED = 0


class PromptCase(Case):
    """A whole prompt into an empty cache, its last logits included.

    ran: uint8 [tokens, routed layers], what the last one ran.
    """

    def __init__(self, engine: Engine | CudaEngine, ids: Tensor, plan: Plan) -> None:
        super().__init__(plan.name, self.one_prompt, self.begin, spins=False)
        self.engine, self.ids, self.plan = engine, ids, plan
        self.mask = None if plan.mask is None else plan.mask(0, 0, len(ids))
        self.cache: Any = engine.new_cache(len(ids))
        self.parts: list[Tensor] = []

    def begin(self) -> None:
        """Nothing is left of what ran before."""
        self.cache.truncate(0)

    def one_prompt(self) -> None:
        """All tokens, as many at a time as the engine takes."""
        self.cache.truncate(0)
        self.parts = []
        rows = self.engine.max_rows
        for start in range(0, len(self.ids), rows):
            piece = self.ids[start : start + rows].contiguous()
            mask = None if self.mask is None else self.mask[start : start + rows].contiguous()
            result = self.engine.forward(
                piece,
                [len(piece)],
                [self.cache],
                routing=self.plan.mode,
                mask=mask,
                thresholds=self.plan.thresholds,
            )
            self.parts.append(result.ran)

    @property
    def ran(self) -> Tensor:
        """uint8 [tokens, routed layers]."""
        return torch.cat(self.parts)


def measure_prompt(
    engine: Engine | CudaEngine,
    tokens: int,
    plans: Sequence[Plan],
    *,
    peers: Sequence[Case] = (),
    rounds: int = 5,
    text: Sequence[int] | None = None,
    setting: Setting | None = None,
    spent: Spent | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[BenchRow]:
    """Rows for our dense pass, for each plan, and for each peer.

    Args:
        text: ids to take the prompt from, over and over; None = random ones. setting, spent: as in `measure_decode`.
    """
    ids = prompt_ids(engine.vocab_size, tokens, text)
    cases = [PromptCase(engine, ids, plan) for plan in (dense_plan(), *plans)]
    clock = alternate([*cases, *peers], rounds=rounds, steps=rounds, warmup=1, progress=progress)
    if spent is not None:
        spent.add(clock)
    where = setting or Setting("", "cpu", engine.dtype, getattr(engine, "num_threads", None))
    shared = {**where.fields(), "batch": 1, "kind": PROMPT, "test": f"pp{tokens}"}
    rows = [_own_row(shared, case, engine, tokens) for case in cases]
    rows += [peer_row(shared, case, tokens) for case in peers]
    return with_comparisons(rows)


def prompt_ids(vocab: int, tokens: int, text: Sequence[int] | None) -> Tensor:
    """int32 [tokens]: text, repeated, or random ids."""
    if text:
        return torch.tensor([text[i % len(text)] for i in range(tokens)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, vocab, (tokens,), generator=generator, dtype=torch.int32)


def _own_row(
    shared: dict[str, Any], case: PromptCase, engine: Engine | CudaEngine, tokens: int
) -> BenchRow:
    figures = timed(case.samples, tokens)
    dense_flops = flops_of_prompt(engine.config, tokens, 0.0, routers=False)
    flops, got = dense_flops, None
    if case.plan.asked is not None:
        got = engine.num_routed - float(case.ran.float().sum(1).mean())
        share = got / max(1, engine.num_routed)
        flops = flops_of_prompt(engine.config, tokens, share)
    return BenchRow(
        **shared,
        name=case.name,
        skip_asked=case.plan.asked,
        skip_got=got,
        **figures,
        work=flops / figures["ms_median"] / 1e6,
        ideal=None if case.plan.asked is None else dense_flops / flops,
        samples=case.samples,
        blocks=case.blocks,
    )
