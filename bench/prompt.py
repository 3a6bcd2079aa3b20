"""Prompts: time against the share of routed layers skipped, beside the ratio of arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from flexidepth.routing import skip_ratio_mask
from flexidepth_ext.engine import Engine

from .ideal import flops_of_prompt
from .timing import Case, alternate

_SEED = 0


@dataclass(frozen=True)
class PromptRow:
    """One line of the table; times are of a whole prompt, its last logits included."""

    name: str
    threads: int
    tokens: int
    skip_share: float | None
    s_median: float
    tps: float
    gflop_per_s: float | None
    speedup: float  # over our dense pass
    ideal: float | None  # ratio of arithmetic
    of_ideal: float | None
    samples: list[float]

    def to_dict(self) -> dict[str, object]:
        """Plain values, every sample included."""
        return asdict(self)


def prompt_case(engine: Engine, ids: torch.Tensor, skip_share: float | None) -> Case:
    """A whole prompt into an empty cache; None = dense."""
    tokens = len(ids)
    cache = engine.new_cache(tokens)
    mask, name = None, "dense"
    if skip_share is not None:
        skipped = round(skip_share * engine.num_routed)
        mask = skip_ratio_mask(skipped, _SEED, 0, tokens, engine.num_routed)
        name = f"skip {skip_share:.0%} ({skipped} of {engine.num_routed})"

    def step() -> None:
        cache.truncate(0)
        for start in range(0, tokens, engine.max_rows):
            piece = ids[start : start + engine.max_rows].contiguous()
            rows = None if mask is None else mask[start : start + engine.max_rows].contiguous()
            routing = "dense" if mask is None else "forced_hard"
            engine.forward(piece, [len(piece)], [cache], routing=routing, mask=rows)  # type: ignore[arg-type]

    return Case(name, step)


def measure_prompt(
    engine: Engine,
    tokens: int,
    shares: Sequence[float],
    *,
    peers: Sequence[Case] = (),
    rounds: int = 5,
    progress: Callable[[str], None] | None = None,
) -> list[PromptRow]:
    """Rows for our dense pass, for each share skipped, and for each peer."""
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, engine.vocab_size, (tokens,), generator=generator, dtype=torch.int32)
    cases: list[tuple[float | None, Case]] = [(None, prompt_case(engine, ids, None))]
    cases += [(share, prompt_case(engine, ids, share)) for share in shares]
    alternate(
        [c for _, c in cases] + list(peers),
        rounds=rounds,
        steps=rounds,
        warmup=1,
        progress=progress,
    )
    dense = cases[0][1].median
    dense_flops = flops_of_prompt(engine.config, tokens, 0.0, routers=False)
    rows = []
    for share, case in cases:
        flops = dense_flops
        if share is not None:
            got = round(share * engine.num_routed) / max(1, engine.num_routed)
            flops = flops_of_prompt(engine.config, tokens, got)
        ideal = dense_flops / flops
        rows.append(_row(case, engine.num_threads, tokens, share, dense, flops, ideal))
    return rows + [
        _row(case, engine.num_threads, tokens, None, dense, None, None) for case in peers
    ]


def _row(
    case: Case,
    threads: int,
    tokens: int,
    share: float | None,
    dense: float,
    flops: float | None,
    ideal: float | None,
) -> PromptRow:
    speedup = dense / case.median
    return PromptRow(
        name=case.name,
        threads=threads,
        tokens=tokens,
        skip_share=share,
        s_median=case.median,
        tps=tokens / case.median,
        gflop_per_s=flops / case.median / 1e9 if flops is not None else None,
        speedup=speedup,
        ideal=ideal,
        of_ideal=speedup / ideal if ideal is not None else None,
        samples=case.samples,
    )
