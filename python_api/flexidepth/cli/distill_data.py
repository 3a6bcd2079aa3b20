"""flexidepth distill-data"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import command_errors, load_model, say
from .options import DType, Model, PreferHub, Threads

_HELP = """Sample the base model's own answers to prompts, as conversations to train on.

PROMPTS has a prompt a line: {"prompt"}, {"question"}, {"text"} or {"messages"}. An interrupted run
goes on where it stopped and ends with the same file.

Example: flexidepth distill-data smollm2-135m --prompts prompts.jsonl --out answers.jsonl
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="distill-data", help=_HELP)(distill_data)


@command_errors
def distill_data(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="The .jsonl or .txt file of prompts.")],
    out: Annotated[Path, typer.Option(help="The .jsonl file to write, or to go on with.")],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="At most this many new tokens.")
    ] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 = greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Keep this much probability; 1 = off.")] = 0.95,
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    batch_size: Annotated[
        int, typer.Option(min=1, max=8, help="Answers sampled together; they do not depend on it.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Another seed gives other answers.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Answer only as many prompts, the first.")
    ] = None,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="Keep answers cut off at --max-new-tokens.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew instead of going on.")
    ] = False,
    threads: Threads = None,
    dtype: DType = "auto",
    prefer_hub: PreferHub = False,
) -> None:
    from ..errors import ValueOutOfRangeError
    from ..training.prompts import read_prompts
    from ..training.self_distillation import DistillOptions, distill

    try:
        options = DistillOptions(
            max_new_tokens, temperature, top_p, samples_per_prompt, seed, keep_unfinished
        )
    except ValueOutOfRangeError as error:
        raise typer.BadParameter(str(error)) from None
    asked = read_prompts(prompts, limit)
    with (
        load_model(
            model, device="auto", dtype=dtype, threads=threads, prefer_hub=prefer_hub
        ) as llm,
        _Bar() as bar,
    ):
        report = distill(
            llm,
            asked,
            out,
            options,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=bar.update,
        )
    say(str(report))
    print(out)


class _Bar:
    """Answers done, time to go and tokens per second, on a terminal."""

    def __enter__(self) -> _Bar:
        import time

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        console = Console(stderr=True)
        self._clock, self._begun = time.monotonic, time.monotonic()
        self._bar = Progress(
            TextColumn("answers"),
            BarColumn(),
            MofNCompleteColumn(),
            Remaining(),
            TextColumn("{task.fields[rate]:.0f} tok/s"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("answers", total=None, rate=0.0)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, tokens: int) -> None:
        """As DistillProgress."""
        rate = tokens / max(1e-9, self._clock() - self._begun)
        self._bar.update(self._task, completed=done, total=total, rate=rate)
