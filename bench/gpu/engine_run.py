"""All that `gpu_check --engine` does with the engine: models checked against float32, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.cuda_runtime import CudaRuntime, Runtime

from ..models import model_config, random_weights
from .engine_check import EngineCheck, check_engine
from .engine_peers import time_peers
from .engine_report import EngineReport
from .engine_timing import time_decode, time_prompts

_CONTEXTS = (128, 4096)
_BATCHES = (1, 2, 4, 8)
_PROMPT = 2048
_SHARES = (0.0, 0.5, 1.0)
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
    gpt_fast: Path | None = None,
    make_runtime: Callable[[], Runtime] = CudaRuntime,
    checked: Sequence[str] = ("tiny", "smollm2-135m"),
    check_tokens: int = 256,
    contexts: Sequence[int] = _CONTEXTS,
    batches: Sequence[int] = _BATCHES,
    prompt: int = _PROMPT,
    steps: int = 48,
) -> None:
    """Check, and, if the checks are good, time each model, without and, where the device can, with overlap.

    Peers come last; gpt_fast: a checkout of it, timed among them. checks, reports: filled as results come, and `save`
    is called after each: nothing is lost to what comes later.
    """
    for name in checked:
        for dtype in (torch.bfloat16, torch.float16):
            notify(f"check: {name}, {dtype}")
            config = model_config(name)
            checks.append(check_engine(name, config, dtype, make_runtime(), check_tokens))
            save()
    if not all(check.ok for check in checks):
        return
    for name in names:
        runtime = make_runtime()
        for overlap in (False, True) if runtime.can_overlap else (False,):
            notify(f"time: {name}{', kernels overlap' if overlap else ''}")
            report = EngineReport(name, overlap, model_config(name).num_routed_layers)
            reports.append(report)
            _time(report, runtime, bandwidth, contexts, batches, prompt, steps)
            save()
    for report in reports if peers else []:
        if not report.overlap:
            notify(f"peers: {report.model}")
            config, device = model_config(report.model), make_runtime().device
            report.peers = time_peers(
                config, torch.bfloat16, device, contexts[0], gpt_fast=gpt_fast
            )
            save()


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
    engine = None
    try:
        engine = CudaEngine(
            config,
            random_weights(config, torch.bfloat16, runtime.device),
            dtype=torch.bfloat16,
            overlap=report.overlap,
            runtime=runtime,
        )
        for context in contexts:
            for batch in batches if context == contexts[0] else batches[:1]:
                asked = skips if batch == 1 else [0, round(report.routed / 2)]
                report.decode += time_decode(engine, bandwidth, batch, context, asked, steps)
        report.prompts = time_prompts(engine, prompt, _SHARES)
    except Exception as error:
        report.said = " ".join(f"stopped: {type(error).__name__}: {error}".split())
    finally:
        if engine is not None:
            engine.close()
