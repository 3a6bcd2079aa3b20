"""Decoding one sequence: tokens per second against layers skipped, dense and peers in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from flexidepth.config import FlexiDepthConfig
from flexidepth.routing import skip_ratio_mask
from flexidepth_ext.engine import Engine

from .ideal import bytes_per_token, ideal_speedup
from .options import SPARE
from .timing import Case, alternate

_SEED = 0
_FILL = 5  # any ordinary token


@dataclass(frozen=True)
class DecodeRow:
    """One line of the table. Times are of a whole token: forward pass and choice of the next token."""

    name: str
    threads: int
    skipped: int | None  # None: not ours to say (a peer)
    ms_median: float
    ms_p99: float
    tps_mean: float
    tps_std: float
    gb_per_s: float | None  # bytes of the model over the median
    speedup: float  # over our dense pass
    ideal: float | None
    of_ideal: float | None
    samples: list[float]

    @property
    def tps_median(self) -> float:
        """Tokens per second at the median time."""
        return 1e3 / self.ms_median

    def to_dict(self) -> dict[str, object]:
        """Plain values, every sample included."""
        return asdict(self)


def engine_case(engine: Engine, name: str, context: int, steps: int, skipped: int | None) -> Case:
    """Decode steps from `context` tokens on, at most `steps` and the warm-up in a turn, with exactly `skipped`
    layers skipped per token; None = dense."""
    cache = engine.new_cache(context + steps + SPARE)
    num_routed = engine.num_routed
    seeds, positions = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    masks: list[torch.Tensor] = []
    if skipped is not None:
        table = skip_ratio_mask(skipped, _SEED, 0, context + steps + SPARE, num_routed)
        masks = [row[None].contiguous() for row in table]
    token = torch.tensor([_FILL], dtype=torch.int32)

    def start() -> None:
        cache.truncate(min(cache.length, context))
        while cache.length < context:
            count = min(engine.max_rows, context - cache.length)
            ids = torch.full((count,), _FILL, dtype=torch.int32)
            engine.forward(ids, [count], [cache], routing="dense")

    def step() -> None:
        nonlocal token
        mask = None if skipped is None else masks[cache.length]
        routing = "dense" if skipped is None else "forced_hard"
        result = engine.forward(token, [1], [cache], routing=routing, mask=mask)  # type: ignore[arg-type]
        token, _ = engine.sample(
            result.logits,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            seeds=seeds,
            positions=positions,
        )

    return Case(name, step, start)


def measure_decode(
    engine: Engine,
    skips: Sequence[int],
    *,
    peers: Sequence[Case] = (),
    context: int = 128,
    rounds: int = 5,
    steps: int = 120,
    progress: Callable[[str], None] | None = None,
) -> list[DecodeRow]:
    """Rows for our dense pass, for each number of skipped layers, and for each peer.

    steps: timed per case, spread over the rounds.
    """
    config = engine.config
    weight_bytes = torch.empty((), dtype=engine.dtype).element_size()
    cases: list[tuple[int | None, Case]] = [
        (None, engine_case(engine, "dense", context, steps, None))
    ]
    cases += [(n, engine_case(engine, f"skip {n}", context, steps, n)) for n in skips]
    others = list(peers)
    alternate([c for _, c in cases] + others, rounds=rounds, steps=steps, progress=progress)
    dense = cases[0][1].median
    rows = [
        _row(case, config, engine.num_threads, n, dense, weight_bytes, context, True)
        for n, case in cases
    ]
    rows += [
        _row(case, config, engine.num_threads, None, dense, weight_bytes, context, False)
        for case in others
    ]
    return rows


def _row(
    case: Case,
    config: FlexiDepthConfig,
    threads: int,
    skipped: int | None,
    dense: float,
    weight_bytes: int,
    context: int,
    ours: bool,
) -> DecodeRow:
    ideal = (
        ideal_speedup(config, skipped, weight_bytes=weight_bytes, context=context)
        if skipped is not None
        else None
    )
    size = bytes_per_token(
        config,
        skipped or 0,
        weight_bytes=weight_bytes,
        context=context,
        routers=skipped is not None,
    )
    rates = [1 / s for s in case.samples]
    mean = sum(rates) / len(rates)
    std = (sum((r - mean) ** 2 for r in rates) / max(1, len(rates) - 1)) ** 0.5
    speedup = dense / case.median
    return DecodeRow(
        name=case.name,
        threads=threads,
        skipped=skipped,
        ms_median=case.median * 1e3,
        ms_p99=case.p99 * 1e3,
        tps_mean=mean,
        tps_std=std,
        gb_per_s=size / case.median / 1e9 if ours else None,
        speedup=speedup,
        ideal=ideal,
        of_ideal=speedup / ideal if ideal is not None else None,
        samples=case.samples,
    )
