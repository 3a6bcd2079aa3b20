"""All that `gpu_check --engine` does with the engine: models checked against float32, then timed.

Each check, each way to run a model and each model's peers is a stage, which can have a process of its own: what it has
sent is kept, whatever ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
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
from .deadline import Deadline
from .engine_check import EngineCheck, check_engine
from .engine_peers import PeerRow, time_peers
from .engine_report import EngineReport
from .engine_timing import time_decode, time_forms, time_prefetch, time_prompts
from .isolated import Send, Way, here
from .told import told

_CONTEXTS = (128, 4096)
_BATCHES = (1, 2, 4, 8)
_PROMPT = 2048
_SHARES = (0.0, 0.5, 1.0)
_PREFETCH_KB = (0, 1024, 4096, 16384)
_SKIP_STEPS = (
    8  # numbers of layers skipped that are timed beside 0: an eighth of the routed ones, two, ...
)
# Of a stage.
_CHECK_SECONDS = 90.0
_TIME_SECONDS = 120.0
_PEERS_SECONDS = 180.0


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
    way: Way = here,
    deadline: Deadline | None = None,
) -> None:
    """Check, then time each model, whatever the checks found: without overlap, with it where the device can, and, where
    the model is small enough, with persistent passes.

    Peers come last; gpt_fast: a checkout of it, timed among them. persistent: whether persistent passes may run at all.
    checks, reports: filled as results come, and `save` is called after each: nothing is lost to what comes later. way:
    how stages are run. deadline: of all; what it leaves no time for is told.
    """
    deadline = deadline or Deadline()
    for name in checked:
        for dtype in (torch.bfloat16, torch.float16):
            notify(f"check: {name}, {dtype}")
            if deadline.passed:
                checks.append(EngineCheck.stopped(name, dtype, deadline.said, left_out=True))
            else:
                work = (name, dtype, make_runtime, check_tokens, persistent)
                stopped = way(_check, work, checks.append, deadline.cut(_CHECK_SECONDS))
                if stopped:
                    checks.append(EngineCheck.stopped(name, dtype, stopped))
            save()
    for name in names:
        runtime = make_runtime()
        config = model_config(name)
        for overlap, whole in _variants(config, runtime, persistent):
            report = EngineReport(name, overlap, config.num_routed_layers, whole)
            notify(f"time: {report.title}")
            reports.append(report)
            if deadline.passed:
                report.left_out.append(deadline.said)
            else:
                what = (make_runtime, bandwidth, contexts, batches, prompt, steps)
                seconds = deadline.cut(_TIME_SECONDS)
                stopped = way(_time, (report, *what), partial(_take, report, save), seconds)
                report.said = report.said or stopped
            save()
    for report in reports if peers else []:
        if not report.overlap and not report.persistent:
            notify(f"peers: {report.model}")
            if deadline.passed:
                stopped = deadline.said
            else:
                who = (report.model, make_runtime, contexts[0], gpt_fast)
                take = partial(_take_peer, report, save)
                stopped = way(_time_peers, who, take, deadline.cut(_PEERS_SECONDS))
            if stopped:
                report.left_out.append(f"peers: {stopped}")
            save()


def _take(report: EngineReport, save: Callable[[], object], newer: EngineReport) -> None:
    """A report becomes what its stage has sent."""
    vars(report).update(vars(newer))
    save()


def _take_peer(report: EngineReport, save: Callable[[], object], row: PeerRow) -> None:
    report.peers.append(row)
    save()


def _check(
    name: str,
    dtype: torch.dtype,
    make_runtime: Callable[[], Runtime],
    tokens: int,
    persistent: bool,
    send: Send,
) -> None:
    """A check."""
    send(check_engine(name, model_config(name), dtype, make_runtime(), tokens, persistent))


def _time_peers(
    model: str,
    make_runtime: Callable[[], Runtime],
    context: int,
    gpt_fast: Path | None,
    send: Send,
) -> None:
    """The peers of a model."""
    config, device = model_config(model), make_runtime().device
    for row in time_peers(config, torch.bfloat16, device, context, gpt_fast=gpt_fast):
        send(row)


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
    make_runtime: Callable[[], Runtime],
    bandwidth: float,
    contexts: Sequence[int],
    batches: Sequence[int],
    prompt: int,
    steps: int,
    send: Send,
) -> None:
    """Fill a report, and send it as it grows; what goes wrong is said in it."""
    config, runtime = model_config(report.model), make_runtime()
    skips = sorted({round(i * report.routed / _SKIP_STEPS) for i in range(_SKIP_STEPS + 1)})
    made: list[CudaEngine] = []

    def engine(overlap: bool | None, persistent: bool | None) -> CudaEngine:
        weights = random_weights(config, torch.bfloat16, runtime.device)
        made.append(
            CudaEngine(
                config,
                weights,
                dtype=torch.bfloat16,
                overlap=overlap,
                persistent=persistent,
                runtime=runtime,
            )
        )
        return made[-1]

    try:
        timed = engine(report.overlap, report.persistent)
        for context in contexts:
            for batch in batches:
                try:
                    report.decode += time_decode(timed, bandwidth, batch, context, skips, steps)
                except OutOfMemoryError as error:
                    report.left_out.append(f"{batch} sequences of {context} tokens: {error}")
                send(report)
        if not report.persistent:
            some = sorted({0, round(report.routed / 2), report.routed})
            report.prefetch = time_prefetch(timed, contexts[0], _PREFETCH_KB, some, steps)
            send(report)
            report.prompts = time_prompts(timed, prompt, _SHARES)
            send(report)
        if not report.persistent and not report.overlap:
            timed.close()  # a card may have no room for two
            report.choices = time_forms(engine(None, None), batches, contexts[0])
    except Exception as error:
        report.said = told(error)
    finally:
        send(report)
        for one in made:
            with suppress(Exception):  # what was measured stands
                one.close()
