"""Tokens per second of the CUDA engine against layers skipped, beside the limit by bytes or by arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexidepth.config import FlexiDepthConfig
from flexidepth_ext.cuda_choice import PassChoice
from flexidepth_ext.cuda_decode import Sampling
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.forward_arguments import Routing

from ..ideal import flops_of_prompt, step_bytes
from ..models import skip_masks

_ROUTINGS: tuple[Routing, ...] = ("dense", "router")
WARM_UP = 8  # steps that are not counted: graphs are captured in them


@dataclass(frozen=True)
class DecodeRow:
    """skipped: layers that each sequence skips a token, at random places; None = the dense model. ms: median of a
    step. share: of the bandwidth of a copy. speedup: over the dense row of the same batch and context; ideal: by the
    bytes of the very decisions."""

    batch: int
    context: int
    skipped: int | None
    ms: float
    ms_p90: float
    tokens_per_second: float
    gigabytes: float
    share: float
    speedup: float
    ideal: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class PrefetchRow:
    """A step at batch 1 while `kb` KiB of each routed layer's weights are brought closer before it is decided whether
    they are needed. skipped: layers that the token skips. ms: median."""

    kb: int
    context: int
    skipped: int
    ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class PromptRow:
    """share: of the routed layers that each token skips; None = dense. ideal: by arithmetic."""

    tokens: int
    share: float | None
    seconds: float
    tokens_per_second: float
    teraflops: float
    speedup: float
    ideal: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def time_decode(
    engine: CudaEngine,
    bandwidth: float,
    batch: int,
    context: int,
    skips: Sequence[int],
    steps: int = 48,
) -> list[DecodeRow]:
    """The dense model, then each number of layers skipped."""
    rows: list[DecodeRow] = []
    dense = 0.0
    dense_bytes = 0.0
    for skipped in (None, *skips):
        masks = (
            None
            if skipped is None
            else skip_masks(engine.config, batch, skipped, WARM_UP + steps + 1)
        )
        times = _step_times(engine, batch, context, masks, WARM_UP + steps)[WARM_UP:]
        read = [
            step_bytes(
                engine.config,
                None if masks is None else masks[WARM_UP + i],
                engine.dtype.itemsize,
                context,
                batch,
            )
            for i in range(steps)
        ]
        mean, median = statistics.fmean(read), statistics.median(times)
        if skipped is None:
            dense, dense_bytes = median, mean
        rows.append(
            DecodeRow(
                batch,
                context,
                skipped,
                median * 1e3,
                sorted(times)[int(0.9 * (len(times) - 1))] * 1e3,
                batch / median,
                mean / 1e9,
                mean / median / bandwidth,
                dense / median,
                dense_bytes / mean,
            )
        )
    return rows


def time_prefetch(
    engine: CudaEngine,
    context: int,
    amounts: Sequence[int],
    skips: Sequence[int],
    steps: int = 48,
) -> list[PrefetchRow]:
    """Each amount, KiB, at each number of layers skipped. The engine's own amount stays what it was."""
    rows, own = list[PrefetchRow](), engine.prefetch_bytes
    for skipped in skips:
        masks = skip_masks(engine.config, 1, skipped, WARM_UP + steps + 1)
        for kb in amounts:
            engine.prefetch_bytes = 1024 * kb
            times = _step_times(engine, 1, context, masks, WARM_UP + steps)[WARM_UP:]
            rows.append(PrefetchRow(kb, context, skipped, statistics.median(times) * 1e3))
    engine.prefetch_bytes = own
    return rows


def _step_times(
    engine: CudaEngine, batch: int, context: int, masks: list[torch.Tensor] | None, steps: int
) -> list[float]:
    """Seconds between the results of steps, one of which is always in flight."""
    caches = [engine.new_cache(context + steps + 1) for _ in range(batch)]
    try:
        for cache in caches:
            cache.extend_with_zeros(context)
        run = engine.decode(
            caches,
            [5] * batch,
            Sampling(),
            seeds=[0] * batch,
            routing="dense" if masks is None else "forced_hard",
        )
        run.launch(None if masks is None else masks[0])
        seconds = []
        last = time.perf_counter()
        for number in range(1, steps + 1):
            run.launch(None if masks is None else masks[number])
            run.collect()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        run.cancel()
    finally:
        for cache in caches:
            cache.release()
    return seconds


def time_forms(engine: CudaEngine, batches: Sequence[int], context: int) -> list[PassChoice]:
    """What an engine that is free to choose measures of the forms of a pass: dense, and as its routers decide."""
    for batch in batches:
        for routing in _ROUTINGS:
            caches = [engine.new_cache(context + 2) for _ in range(batch)]
            for cache in caches:
                cache.extend_with_zeros(context)
            run = engine.decode(caches, [5] * batch, Sampling(), seeds=[0] * batch, routing=routing)
            run.launch()
            run.collect()
            for cache in caches:
                cache.release()
    return engine.pass_choices


def time_prompts(
    engine: CudaEngine, tokens: int, shares: Sequence[float], repeats: int = 5
) -> list[PromptRow]:
    """The dense model, then each share of the routed layers skipped."""
    config, rows = engine.config, list[PromptRow]()
    ids = torch.randint(0, config.vocab_size, (tokens,), dtype=torch.int32)
    dense = 0.0
    for share in (None, *shares):
        skipped = round((share or 0.0) * config.num_routed_layers)
        mask = skip_masks(config, tokens, skipped, 1)[0]
        times = []
        for _ in range(repeats + 1):
            cache = engine.new_cache(tokens)
            begin = time.perf_counter()
            for start in range(0, tokens, engine.max_rows):
                piece = slice(start, start + engine.max_rows)
                engine.forward(
                    ids[piece].clone(),
                    [len(ids[piece])],
                    [cache],
                    routing="dense" if share is None else "forced_hard",
                    mask=None if share is None else mask[piece].clone(),
                )
            times.append(time.perf_counter() - begin)
            cache.release()
        median = statistics.median(times[1:])  # the first one warms up
        dense = dense or median
        got = skipped / max(1, config.num_routed_layers)
        flops = _flops(config, tokens, None if share is None else got)
        rows.append(
            PromptRow(
                tokens,
                None if share is None else got,
                median,
                tokens / median,
                flops / median / 1e12,
                dense / median,
                _flops(config, tokens, None) / flops,
            )
        )
    return rows


def _flops(config: FlexiDepthConfig, tokens: int, share: float | None) -> float:
    return flops_of_prompt(config, tokens, share or 0.0, routers=share is not None)
