"""Trains the default model's routers and adapters anew, from nothing: `python -m flexidepth.bench.retrain OUT_DIR`.

Fetches texts, lets the base model answer prompts, trains, finds the thresholds of the dial and measures the quality.
What an interrupted run has done already is not done again.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import FlexiDepthError

MODEL = "smollm2-135m"
_TEXTS = ("wiki", "chat", "code")
_HELD_OUT = ("prose", "code", "chat", "distilled")
_REPEATS = 3  # of the base model's own answers, which are what the routers will be used on


@dataclass(frozen=True)
class Stage:
    """A command of this package. done: it is over when this is there; None = it finds out by itself."""

    name: str
    command: list[str]
    done: Path | None = None


def stages(out: Path, recipe: str, gsm8k: Path | None) -> list[Stage]:
    """From texts to a measured checkpoint."""
    data, run = out / "data", out / "run"
    routing = str(run / "budgets" / "routing")
    train, held_out = data / "train", data / "held_out"
    fetch = [str(data), *([] if gsm8k is None else ["--gsm8k", str(gsm8k)])]
    made = [
        Stage("texts", ["flexidepth.bench.training_data", *fetch], data / "SOURCES.md"),
    ]
    for part in ("train", "held_out"):
        prompts, answers = data / "prompts" / f"{part}.jsonl", data / part / "distilled.jsonl"
        command = ["distill-data", MODEL, "--prompts", str(prompts), "--out", str(answers)]
        made.append(Stage(f"answers, {part}", ["flexidepth", *command]))
    learnt = [*(f"{name}.jsonl" for name in _TEXTS), *["distilled.jsonl"] * _REPEATS]
    watched = ["chat.jsonl", "distilled.jsonl"]
    command = [
        *("train", recipe, "--output-dir", str(run)),
        *(word for name in learnt for word in ("--train", str(train / name))),
        *(word for name in watched for word in ("--held-out", str(held_out / name))),
        *(["--resume"] if run.exists() else []),
    ]
    made.append(Stage("training", ["flexidepth", *command], Path(routing)))
    texts = [held_out / f"{name}.jsonl" for name in _HELD_OUT]
    command = ["calibrate", routing, *(w for text in texts for w in ("--data", str(text)))]
    made.append(Stage("calibration", ["flexidepth", *command]))
    named = [
        w for name, text in zip(_HELD_OUT, texts, strict=True) for w in (f"--{name}", str(text))
    ]
    measured = [
        *(
            "--skipped",
            "1,2,3,4,6,8",
            "--methods",
            "flexidepth,random,shortgpt",
            "--tokens",
            "4096",
        ),
        *("--answers", "16", "--max-new-tokens", "128", "--per-kind", "6"),
    ]
    command = ["eval", routing, *named, *measured, "--output-dir", str(out / "quality")]
    made.append(Stage("quality", ["flexidepth", *command], out / "quality" / "eval.md"))
    return made


def run_stage(stage: Stage) -> None:
    """Run it, unless it is over. FlexiDepthError where it fails: the same command goes on from there."""
    if stage.done is not None and stage.done.exists():
        say(f"{stage.name}: there already ({stage.done})")
        return
    command = [sys.executable, "-m", *stage.command]
    say(f"{stage.name}: {shlex.join(command[1:])}")
    code = subprocess.run(command, check=False).returncode
    if code:
        raise FlexiDepthError(
            f"retrain: {stage.name} failed with exit code {code}; what it says stands above, and the same "
            "command goes on from here"
        )


@command_errors
def main(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where everything goes.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe that comes with the package, or YAML.")
    ] = MODEL,
    gsm8k: Annotated[
        Path | None, typer.Option(help="GSM8K's train.jsonl; without it there is no mathematics.")
    ] = None,
) -> None:
    """Retrain the default model from nothing."""
    out.mkdir(parents=True, exist_ok=True)
    for stage in stages(out, recipe, gsm8k):
        run_stage(stage)
    say(f"routers and adapters: {out / 'run' / 'budgets' / 'routing'}; quality: {out / 'quality'}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
