"""Trains the default model's routers and adapters anew, from nothing: `python -m flexidepth.bench.retrain OUT_DIR`.

Fetches texts, lets the base model answer prompts, trains, rounds the result to the types that are shipped, finds the
thresholds of the dial and measures the quality. What an interrupted run has done already is not done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexidepth.cli.common import command_errors, say

from .stages import HELD_OUT, Stage, answer_prompts, fetch_texts, measure_quality, run_stages

MODEL = "smollm2-135m"
_TEXTS = ("wiki", "chat", "code")
_SHIPPED_FORM = "flexidepth.bench.shipped_form"
_REPEATS = 3  # of the base model's own answers, which are what the routers will be used on


def stages(out: Path, recipe: str, gsm8k: Path | None) -> list[Stage]:
    """From texts to a measured checkpoint."""
    from flexidepth.training.command import find_recipe
    from flexidepth.training.run import RESULT_FOLDER

    data, run = out / "data", out / "run"
    trained, routing = run / find_recipe(recipe).stages[-1].name / RESULT_FOLDER, out / "routing"
    train, held_out = data / "train", data / "held_out"
    names = [*_TEXTS, *(["gsm8k"] if gsm8k is not None else []), *["distilled"] * _REPEATS]
    learnt = [f"{name}.jsonl" for name in names]
    watched = ["chat.jsonl", "distilled.jsonl"]
    training = [
        *("train", recipe, "--output-dir", str(run)),
        *(word for name in learnt for word in ("--train", str(train / name))),
        *(word for name in watched for word in ("--held-out", str(held_out / name))),
        *(["--resume"] if run.exists() else []),
    ]
    texts = [word for name in HELD_OUT for word in ("--data", str(held_out / f"{name}.jsonl"))]
    return [
        fetch_texts(data, gsm8k),
        answer_prompts(data, "train", MODEL),
        answer_prompts(data, "held_out", MODEL),
        Stage("training", ["flexidepth", *training], trained),
        Stage("shipped form", [_SHIPPED_FORM, str(trained), str(routing)], routing),
        Stage(
            "calibration",
            ["flexidepth", "calibrate", str(routing), *texts, "--default", "quality"],
            routing / ".calibrated",  # goes with what it is about
            marks=True,
        ),
        measure_quality(str(routing), data, out / "quality"),
    ]


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
    run_stages(stages(out, recipe, gsm8k))
    say(f"routers and adapters: {out / 'routing'}; quality: {out / 'quality'}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
