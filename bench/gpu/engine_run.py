"""All that `gpu_check --engine` does with the engine: models checked against float32, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch

from flexidepth.checkpoints.checkpoint import expected_shapes
from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import OutOfMemoryError
from flexidepth_ext.cuda_choice import may_pay
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.cuda_runtime import CudaRuntime, Runtime

from ..models import model_config, random_weights
from .engine_check import EngineCheck, check_engine
from .engine_peers import time_peers
from .engine_report import EngineReport, told
from .engine_timing import time_decode, time_forms, time_prefetch, time_prompts

_CONTEXTS = (128, 4096)
_BATCHES = (1, 2, 4, 8)
_PROMPT = 2048
_SHARES = (0.0, 0.5, 1.0)
_PREFETCH_KB = (0, 1024, 4096, 16384)
_SKIP_STEPS = (
    8  # numbers of layers skipped that are timed beside 0: an eighth of the routed ones, two, ...
)


def run(
    names: Sequence[str],
    bandwidth: float,
    peers: bool,
    notify: Callable[[str], None],
    checks: list[EngineCheck],
    reports: list[EngineReport],
    save: Callable[[], object],
    *,
    persistent: bool = True,
    gpt_fast: Path | None = None,
    make_runtime: Callable[[], Runtime] = CudaRuntime,
    checked: Sequence[str] = ("tiny", "smollm2-135m"),
    check_tokens: int = 256,
    contexts: Sequence[int] = _CONTEXTS,
    batches: Sequence[int] = _BATCHES,
    prompt: int = _PROMPT,
    steps: int = 48,
) -> None:
    """Check, then time each model, whatever the checks found: without overlap, with it where the device can, and, where
    the model is small enough, with persistent passes.

    Peers come last; gpt_fast: a checkout of it, timed among them. persistent: whether persistent passes may run at all.
    checks, reports: filled as results come, and `save` is called after each: nothing is lost to what comes later.
    """
    for name in checked:
        for dtype in (torch.bfloat16, torch.float16):
            notify(f"check: {name}, {dtype}")
            checks.append(_check(name, dtype, make_runtime, check_tokens, persistent))
            save()
    for name in names:
        runtime = make_runtime()
        config = model_config(name)
        for overlap, whole in _variants(config, runtime, persistent):
            report = EngineReport(name, overlap, config.num_routed_layers, whole)
            notify(f"time: {report.title}")
            reports.append(report)
            _time(report, runtime, bandwidth, contexts, batches, prompt, steps)
            save()
    for report in reports if peers else []:
        if not report.overlap and not report.persistent:
            notify(f"peers: {report.model}")
            _time_peers(report, make_runtime, contexts[0], gpt_fast)
            save()


def _check(
    name: str,
    dtype: torch.dtype,
    make_runtime: Callable[[], Runtime],
    tokens: int,
    persistent: bool,
) -> EngineCheck:
    """A check; one that is stopped has failed, and says by what."""
    try:
        return check_engine(name, model_config(name), dtype, make_runtime(), tokens, persistent)
    except Exception as error:
        return EngineCheck.stopped(name, dtype, told(error))


def _time_peers(
    report: EngineReport,
    make_runtime: Callable[[], Runtime],
    context: int,
    gpt_fast: Path | None,
) -> None:
    """Add the peers to a report; what goes wrong is said in it."""
    try:
        config, device = model_config(report.model), make_runtime().device
        report.peers = time_peers(config, torch.bfloat16, device, context, gpt_fast=gpt_fast)
    except Exception as error:
        report.left_out.append(f"peers: {told(error)}")


def _variants(
    config: FlexiDepthConfig, runtime: Runtime, persistent: bool
) -> list[tuple[bool, bool]]:
    """With overlap, persistent: what is worth timing."""
    nbytes = {name: 2 * prod(shape) for name, shape in expected_shapes(config).items()}
    variants = [(False, False)]
    if runtime.can_overlap:
        variants.append((True, False))
    if persistent and may_pay(nbytes):
        variants.append((False, True))
    return variants


def _time(
    report: EngineReport,
    runtime: Runtime,
    bandwidth: float,
    contexts: Sequence[int],
    batches: Sequence[int],
    prompt: int,
    steps: int,
) -> None:
    """Fill a report; what goes wrong is said in it."""
    config = model_config(report.model)
    skips = sorted({round(i * report.routed / _SKIP_STEPS) for i in range(_SKIP_STEPS + 1)})
    made: list[CudaEngine] = []

    def engine(persistent: bool | None) -> CudaEngine:
        weights = random_weights(config, torch.bfloat16, runtime.device)
        made.append(
            CudaEngine(
                config,
                weights,
                dtype=torch.bfloat16,
                overlap=report.overlap,
                persistent=persistent,
                runtime=runtime,
            )
        )
        return made[-1]

    try:
        timed = engine(report.persistent)
        for context in contexts:
            for batch in batches:
                try:
                    report.decode += time_decode(timed, bandwidth, batch, context, skips, steps)
                except OutOfMemoryError as error:
                    report.left_out.append(f"{batch} sequences of {context} tokens: {error}")
        if report.persistent:
            report.choices = time_forms(engine(None), batches, contexts[0])
        else:
            some = sorted({0, round(report.routed / 2), report.routed})
            report.prefetch = time_prefetch(timed, contexts[0], _PREFETCH_KB, some, steps)
            report.prompts = time_prompts(timed, prompt, _SHARES)
    except Exception as error:
        report.said = told(error)
    finally:
        for one in made:
            with suppress(Exception):  # what was measured stands
                one.close()
