"""Measures on this machine what the README shows: `python -m flexidepth.bench.reproduce OUT_DIR`.

Speed beside llama.cpp, if it is installed, and transformers, quality on texts and task scores on questions that are
fetched; then a page with the README's tables and plots. What an interrupted run has done already is not done again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexidepth.cli.common import command_errors, say

from .readme import tables
from .retrain import MODEL
from .stages import Stage, answer_prompts, fetch_texts, measure_quality, run_stages

_PAGE = "README.md"
# Not all of them: threads of many runtimes in one process disturb each other.
_PEERS = ("llama.cpp", "transformers-eager", "transformers-eager-float32")
_SPEED = """# Speed

<!-- table decode: speed/bench.json -->
<!-- end -->

![Tokens per second against layers skipped, with the ideal line](speed/decode.svg)

<!-- table prompt: speed/bench.json -->
<!-- end -->

![Seconds of a prompt against the share of layers skipped](speed/prompt.svg)

![Where the time of a layer goes](speed/breakdown.svg)

<!-- table breakdown: speed/bench.json -->
<!-- end -->

<!-- table answers: speed/bench.json -->
<!-- end -->

Every figure: [bench.md](speed/bench.md)
"""
_QUALITY = """
# Quality

<!-- table quality: quality/eval.json -->
<!-- end -->

![Perplexity against layers skipped and against bytes read](quality/eval.png)

Every figure: [eval.md](quality/eval.md)

<!-- table tasks: tasks/eval.json -->
<!-- end -->

Every figure: [eval.md](tasks/eval.md)
"""


def speed(out: Path) -> Stage:
    """Every number of layers, one thread and two, beside the peers of the README."""
    command = [
        *("bench", MODEL, "--threads", "1,2", "--skip", "all", "--accuracy", "--breakdown"),
        *(word for name in _PEERS for word in ("--peer", name)),
        *("--rounds", "5", "--output-dir", str(out)),
    ]
    return Stage("speed", ["flexidepth", *command], out / "bench.json")


def task_scores(out: Path, data: Path) -> Stage:
    """Questions with choices, 200 of each set."""
    command = [
        *("eval", MODEL, "--tasks", str(data / "questions")),
        *("--calibration", str(data / "held_out" / "prose.jsonl"), "--skipped", "1,2,3,4,6,8"),
        *("--limit", "200", "--per-kind", "0", "--answers", "0", "--output-dir", str(out)),
    ]
    return Stage("task scores", ["flexidepth", *command], out / "eval.md")


def stages(out: Path, gsm8k: Path | None, only_speed: bool) -> list[Stage]:
    """Speed first, while the machine is idle."""
    found = [speed(out / "speed")]
    if not only_speed:
        data = out / "data"
        found += [
            fetch_texts(data, gsm8k),
            answer_prompts(data, "held_out", MODEL),
            measure_quality(MODEL, data, out / "quality"),
            task_scores(out / "tasks", data),
        ]
    return found


@command_errors
def main(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Where everything goes.")],
    gsm8k: Annotated[
        Path | None,
        typer.Option(
            help="GSM8K's train.jsonl; without it the prompts of the base model's own answers hold no mathematics."
        ),
    ] = None,
    only_speed: Annotated[
        bool, typer.Option("--only-speed", help="Ten minutes instead of an hour or two.")
    ] = False,
) -> None:
    """Measure everything that the README shows."""
    out.mkdir(parents=True, exist_ok=True)
    run_stages(stages(out, gsm8k, only_speed))
    page = _SPEED
    if not only_speed:
        page += _QUALITY
    (out / _PAGE).write_text(tables(page, out), encoding="utf-8")
    say(f"tables and plots: {out / _PAGE}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
