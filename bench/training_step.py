"""Where the time of a training step goes: `python -m flexidepth.bench.training_step --train TEXT`.

Runs steps of a recipe's last stage, from the routers of a checkpoint or from seeded ones, and times its parts,
each without the parts within it: what the step pays for the halves that its tokens skip, among others.
"""

from __future__ import annotations

import functools
import json
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexidepth.cli.common import command_errors, say

from .machine import describe_machine

NOT_TAKEN = "path not taken"
_WARM_UP = 2  # steps that are not counted


class Stopwatch:
    """Seconds by name; while an inner name runs, the outer ones stand still."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        """Forget what was counted; names that are open stay so."""
        self.seconds.clear()
        self._since = _now()

    def _turn(self) -> None:
        now = _now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Count the time within for `name`."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def inside(self, name: str) -> bool:
        """Whether `name` runs now."""
        return name in self._open


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class StepTimes:
    """steps that were counted, their tokens, their seconds by part."""

    steps: int
    tokens: int
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the shares."""
        total = sum(self.seconds.values())
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / total,
            "seconds": {name: round(s, 4) for name, s in self.seconds.items()},
            "shares": {name: round(s / total, 4) for name, s in self.seconds.items()},
        }


@contextmanager
def timed(watch: Stopwatch, on_step: Callable[[], None]) -> Iterator[None]:
    """Within it, the parts of training steps are counted by `watch`; on_step is called before each step."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from flexidepth.ablations import AblatedLayer
    from flexidepth.layers import DecoderLayer
    from flexidepth.modeling import FlexiDepthModel
    from flexidepth.training import objective
    from flexidepth.training.trainer import RoutingTrainer

    base = "base model's own pass"

    def layer(one: Any, *_: Any) -> str:
        if watch.inside(base):
            return base
        return "path taken" if one.routed else "layers that are not routed"

    parts: list[tuple[Any, str, str | Callable[..., str]]] = [
        (RoutingTrainer, "training_step", "rest of the step"),
        (FlexiDepthModel, "_base_from", base),
        (DecoderLayer, "forward", layer),
        (DecoderLayer, "_difference", NOT_TAKEN),
        (AblatedLayer, "_difference", NOT_TAKEN),
        (objective, "head_losses", "head and loss"),
        (Accelerator, "backward", "backward"),
        (AcceleratedOptimizer, "step", "optimiser"),
    ]

    def wrapped(function: Any, name: str | Callable[..., str]) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "rest of the step":
                on_step()
            with watch.running(name if isinstance(name, str) else name(*args)):
                return function(*args, **kwargs)

        return call

    before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in parts]
    try:
        for owner, attribute, name in parts:
            setattr(owner, attribute, wrapped(getattr(owner, attribute), name))
        yield
    finally:
        for owner, attribute, function in before:
            setattr(owner, attribute, function)


def time_steps(recipe: Any, steps: int, notify: Callable[[str], None]) -> StepTimes:
    """Time steps of a recipe's last stage (training.recipe.Recipe)."""
    from flexidepth.training.command import train_recipe

    sequences = recipe.batch_size * recipe.gradient_accumulation
    tokens = sequences * recipe.data.length
    stage = replace(recipe.stages[-1], tokens=(_WARM_UP + steps) * tokens, fit_adapters=0)
    recipe = replace(recipe, stages=[stage], eval_sequences=1)
    watch, seen = Stopwatch(), 0

    def count() -> None:
        nonlocal seen
        if seen == _WARM_UP * recipe.gradient_accumulation:
            watch.reset()
        seen += 1

    with tempfile.TemporaryDirectory() as folder, timed(watch, count):
        train_recipe(recipe, Path(folder) / "run", notify=notify)
    return StepTimes(steps, steps * tokens, dict(watch.seconds))


@command_errors
def main(
    train: Annotated[list[str], typer.Option(help="Text to train on; may be repeated.")],
    recipe: Annotated[str, typer.Option(help="A YAML file, or a shipped recipe.")] = "smollm2-135m",
    start: Annotated[
        str | None, typer.Option(help="A routing checkpoint to start from; default: seeded.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to count.")] = 10,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    """Time the parts of training steps."""
    from flexidepth.training.command import changed_recipe, find_recipe

    chosen = changed_recipe(find_recipe(recipe), train=train, start=start)
    result = {
        "command": "python -m flexidepth.bench.training_step " + shlex.join(sys.argv[1:]),
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "start": start or "seeded",
        **time_steps(chosen, steps, say).to_dict(),
    }
    text = json.dumps(result, indent=1)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
