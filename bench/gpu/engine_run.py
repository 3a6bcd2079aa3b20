"""All that `gpu_check --engine` does with the engine: models checked against float32, then timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from flexidepth.errors import OutOfMemoryError
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.cuda_runtime import CudaRuntime, Runtime

from .engine_check import EngineCheck, check_engine
from .engine_peers import time_peers
from .engine_report import EngineReport
from .engine_timing import time_decode, time_prompts
from .models import model_config, random_weights

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
    *,
    make_runtime: Callable[[], Runtime] = CudaRuntime,
    checked: Sequence[str] = ("tiny", "smollm2-135m"),
    contexts: Sequence[int] = _CONTEXTS,
    batches: Sequence[int] = _BATCHES,
    prompt: int = _PROMPT,
    steps: int = 48,
) -> tuple[list[EngineCheck], list[EngineReport]]:
    """Check, and, if the checks are good, time each model, without and, where the device can, with overlap."""
    checks = []
    for name in checked:
        for dtype in (torch.bfloat16, torch.float16):
            notify(f"check: {name}, {dtype}")
            checks.append(check_engine(name, model_config(name), dtype, make_runtime()))
    if not all(check.ok for check in checks):
        return checks, []
    reports = []
    for name in names:
        runtime = make_runtime()
        for overlap in (False, True) if runtime.can_overlap else (False,):
            notify(f"time: {name}{', kernels overlap' if overlap else ''}")
            reports.append(
                _timed(name, runtime, overlap, bandwidth, contexts, batches, prompt, steps)
            )
        if peers:
            notify(f"peers: {name}")
            reports[-1].peers = time_peers(
                model_config(name), torch.bfloat16, runtime.device, contexts[0]
            )
    return checks, reports


def _timed(
    name: str,
    runtime: Runtime,
    overlap: bool,
    bandwidth: float,
    contexts: Sequence[int],
    batches: Sequence[int],
    prompt: int,
    steps: int,
) -> EngineReport:
    config = model_config(name)
    routed = config.num_routed_layers
    report = EngineReport(name, overlap, routed)
    skips = sorted({round(i * routed / _SKIP_STEPS) for i in range(_SKIP_STEPS + 1)})
    try:
        engine = CudaEngine(
            config,
            random_weights(config, torch.bfloat16, runtime.device),
            dtype=torch.bfloat16,
            max_rows=prompt,
            overlap=overlap,
            runtime=runtime,
        )
        for context in contexts:
            for batch in batches if context == contexts[0] else batches[:1]:
                asked = skips if batch == 1 else [0, round(routed / 2)]
                report.decode += time_decode(engine, bandwidth, batch, context, asked, steps)
        report.prompts = time_prompts(engine, prompt, _SHARES)
        engine.close()
    except OutOfMemoryError as error:
        report.said = f"left out: {error}"
    return report
