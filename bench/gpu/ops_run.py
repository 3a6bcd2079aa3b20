"""All that `gpu_check` does with the ops of a model: each timed, whatever happens to another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from .cases import LLAMA_3_8B, SMOLLM2, OpCase, Shape, op_cases, router_case
from .deadline import Deadline
from .isolated import Send, Way, here
from .layer_cases import layer_cases
from .timing import OpRow, measure_in_graphs, time_case
from .told import told

SHAPES: dict[str, Shape] = {"llama-3-8b": LLAMA_3_8B, "smollm2-135m": SMOLLM2}
_SECONDS = 150.0  # for the ops of a model
_QUIET = 30.0  # for one of them, and for the start of a process
_MOST_PROCESSES = 6  # of a model: one that an op ends is followed by another, up to here


@dataclass(frozen=True)
class Untimed:
    """An op that was not timed. large: the device's memory does not hold it."""

    what: str
    large: bool = False


class _Progress:
    """What has come of a model's ops."""

    def __init__(self, found: list[OpRow], save: Callable[[], object]) -> None:
        self.found, self.save = found, save
        self.untimed: list[Untimed] = []
        self.begun: list[str] = []
        self.answered = 0  # of those begun
        self.finished = False

    def take(self, one: OpRow | Untimed | str | None) -> None:
        """A message of `time_ops`."""
        if one is None:
            self.finished = True
        elif isinstance(one, str):
            self.begun.append(one)
        else:
            self.answered += 1
            if isinstance(one, OpRow):
                self.found.append(one)
            else:
                self.untimed.append(one)
            self.save()

    def said(self, stopped: str) -> tuple[bool, str]:
        """Whether nothing was stopped, and all that is to be told."""
        large = [one.what for one in self.untimed if one.large]
        words = [f"{len(self.found)} timed"]
        words += [f"too large for the device's memory: {what}" for what in large]
        others = [one.what for one in self.untimed if not one.large]
        others += [stopped] if stopped else []
        return not others, "; ".join(words + others)


def run(
    shape: Shape,
    bandwidth: float,
    rows: Sequence[int],
    found: list[OpRow],
    save: Callable[[], object],
    *,
    way: Way = here,
    deadline: Deadline | None = None,
) -> tuple[bool | None, str]:
    """Every op at the shapes of a model; `found` is filled, and `save` called, as results come. An op that ends its
    process, or leaves the device unusable for it, is told, and another process goes on behind it.

    Returns:
        Whether nothing was stopped, None where no time was left; and how many were timed, what does not fit the
        device's memory, what was stopped.
    """
    deadline = deadline or Deadline()
    if deadline.passed:
        return None, deadline.said
    limit, progress, stopped = Deadline(deadline.cut(_SECONDS)), _Progress(found, save), ""
    for _ in range(_MOST_PROCESSES):
        work = (shape, bandwidth, tuple(rows), len(progress.begun))
        stopped = way(time_ops, work, progress.take, limit.left, _QUIET)
        if len(progress.begun) > progress.answered:
            progress.take(Untimed(f"{progress.begun[-1]}, {stopped}"))
        elif stopped:  # by none of the ops
            break
        if progress.finished:
            return progress.said("")
        if limit.passed:
            stopped = "the rest: no time was left"
            break
        stopped = f"the rest: {_MOST_PROCESSES} processes ended before it"
    return progress.said(stopped)


def time_ops(shape: Shape, bandwidth: float, rows: tuple[int, ...], begin: int, send: Send) -> None:
    """The ops from number `begin` on. Of each its name is sent, then what came of it; at the end None. What stops one
    op stops no other, unless the device can do nothing more for this process."""
    for case in _cases(shape, rows)[begin:]:
        what = f"{case.op} {case.what}, {case.rows} rows"
        send(what)
        try:
            send(time_case(case, bandwidth, measure_in_graphs))
        except torch.OutOfMemoryError:
            send(Untimed(what, large=True))
        except Exception as error:
            send(Untimed(f"{what}, {told(error)}"))
            if _unusable():
                return
        with suppress(Exception):
            torch.cuda.empty_cache()
    send(None)


def _cases(shape: Shape, rows: tuple[int, ...]) -> list[OpCase]:
    from flexidepth_ext.cuda_ops import cuda_ops

    ops = cuda_ops()
    return [
        *op_cases(ops, shape, torch.bfloat16, "cuda", rows),
        *layer_cases(ops, shape, torch.bfloat16, "cuda", rows),
        router_case(ops, shape, "cuda"),
    ]


def _unusable() -> bool:
    """Whether an error on the device stays."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False
