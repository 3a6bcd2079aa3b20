"""Commands of this package one behind the other, each of which is over when something is there."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flexidepth.cli.common import say
from flexidepth.errors import FlexiDepthError


@dataclass(frozen=True)
class Stage:
    """A command of this package. done: it is over when this is there; None = it finds out by itself. marks: `done` is
    no work of the command but an empty file, made once it has ended well."""

    name: str
    command: list[str]
    done: Path | None = None
    marks: bool = False


def run_stages(stages: Sequence[Stage]) -> None:
    """Run those that are not over. FlexiDepthError where one fails: the same call goes on from there."""
    for stage in stages:
        run_stage(stage)


def run_stage(stage: Stage) -> None:
    """Run it, unless it is over. A signal that ends this process ends the stage as well."""
    if stage.done is not None and stage.done.exists():
        say(f"{stage.name}: there already ({stage.done})")
        return
    command = [sys.executable, "-m", *stage.command]
    say(f"{stage.name}: {shlex.join(command[1:])}")
    process = subprocess.Popen(command)

    def end(number: int, _: FrameType | None) -> None:
        process.send_signal(number)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        code = process.wait()
    except BaseException:  # the above, or Ctrl-C, which reaches the stage too
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise FlexiDepthError(
            f"{stage.name} failed with exit code {code}; what it says stands above, and the same command goes on "
            "from here"
        )
    if stage.marks and stage.done is not None:
        stage.done.touch()


# Texts held out from training, by their names in `flexidepth eval`.
HELD_OUT = ("prose", "code", "chat", "distilled")


def fetch_texts(data: Path, gsm8k: Path | None) -> Stage:
    """Text to train and to measure on."""
    given = [] if gsm8k is None else ["--gsm8k", str(gsm8k)]
    command = ["flexidepth.bench.training_data", str(data), *given]
    return Stage("texts", command, data / "SOURCES.md")


def answer_prompts(data: Path, part: str, model: str) -> Stage:
    """The base model's own answers; part: "train" or "held_out"."""
    prompts, answers = data / "prompts" / f"{part}.jsonl", data / part / "distilled.jsonl"
    command = ["distill-data", model, "--prompts", str(prompts), "--out", str(answers)]
    return Stage(f"answers, {part}", ["flexidepth", *command])


def measure_quality(model: str, data: Path, out: Path) -> Stage:
    """Perplexity, first choices, answers and layers by kind of task, at six numbers of layers skipped."""
    texts = [
        word
        for name in HELD_OUT
        for word in (f"--{name}", str(data / "held_out" / f"{name}.jsonl"))
    ]
    command = [
        *("eval", model, *texts, "--skipped", "1,2,3,4,6,8"),
        *("--tokens", "4096", "--answers", "16", "--max-new-tokens", "128", "--per-kind", "16"),
        *("--output-dir", str(out)),
    ]
    return Stage("quality", ["flexidepth", *command], out / "eval.md")
