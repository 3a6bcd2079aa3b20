"""flexidepth eval"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import command_errors, float_numbers, print_json, say
from .options import DType, Json, Model, PreferHub, Threads

_HELP = """Quality against layers skipped: perplexity, tasks, answers, beside baselines that skip as many.

Each part runs where its data is given; figures are relative to the model with every layer run. Results are
kept as they are measured: the same command with the same --output-dir goes on where it was interrupted.

Example: flexidepth eval my-model --prose prose.jsonl --tasks tasks/ --output-dir results
"""


_FILE_WIDTH = 120


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="eval", help=_HELP)(evaluate_model)


def _named(values: list[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if wrong := [value for value, pair in zip(values, pairs, strict=True) if not all(pair)]:
        raise typer.BadParameter(f"--also {wrong[0]!r}: wanted NAME=MODEL")
    named = {name: model for name, _, model in pairs}
    if len(named) < len(values):
        raise typer.BadParameter(f"--also {', '.join(values)}: wanted each name once")
    return named


@command_errors
def evaluate_model(
    model: Model,
    prose: Annotated[
        Path | None,
        typer.Option(help='Held-out text: jsonl of {"text": ...} or {"messages": ...}.'),
    ] = None,
    code: Annotated[Path | None, typer.Option(help="The same of code.")] = None,
    chat: Annotated[
        Path | None,
        typer.Option(help="The same of conversations. First questions are answered too."),
    ] = None,
    distilled: Annotated[
        Path | None,
        typer.Option(help="The same of the base model's own answers, see distill-data."),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Multiple-choice questions: a jsonl file or a directory.")
    ] = None,
    skipped: Annotated[str, typer.Option(help="Mean layers to skip.")] = "0,1,2,3,4,6,8",
    methods: Annotated[
        str,
        typer.Option(
            help="What to measure beside the base model: flexidepth finds thresholds on each set of texts, dial takes "
            "the model's stored calibration, the others skip as many layers without routers."
        ),
    ] = "flexidepth,dial,static-adapters,random-adapters,random,shortgpt,shortgpt-routed",
    also: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL: a further checkpoint of the same base; may be repeated."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text for block influence and the thresholds of answers; default: what the files hold behind the "
            "measured part, where each set of texts finds its own thresholds."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of each set of texts.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    calibration_tokens: Annotated[
        int, typer.Option(help="Most tokens to find thresholds on, of each set and task.")
    ] = 3072,
    limit: Annotated[int, typer.Option(help="Questions of a task.")] = 200,
    answers: Annotated[
        int, typer.Option(help="First questions of conversations to answer; 0 = none.")
    ] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    per_kind: Annotated[
        int, typer.Option(help="Made-up tasks of each kind whose layers are counted; 0 = none.")
    ] = 8,
    kinds_skipped: Annotated[
        float, typer.Option(help="Mean layers skipped while they are counted.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of layers skipped at random and made-up tasks.")] = 0,
    dtype: DType = "auto",
    threads: Threads = None,
    prefer_hub: PreferHub = False,
    as_json: Json = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write JSON, Markdown and figures here.")
    ] = None,
) -> None:
    from ..errors import ValueOutOfRangeError
    from ..evaluation.options import EvalOptions
    from ..evaluation.run import evaluate

    texts = {"prose": prose, "code": code, "chat": chat, "distilled": distilled}
    arguments: dict[str, Any] = {
        "model": model,
        "texts": {name: path for name, path in texts.items() if path is not None},
        "tasks": tasks,
        "skipped": float_numbers(skipped, "--skipped"),
        "methods": [name for name in methods.split(",") if name],
        "also": _named(also or []),
        "calibration": calibration,
        "tokens": tokens,
        "window": window,
        "calibration_tokens": calibration_tokens,
        "limit": limit,
        "answers": answers,
        "max_new_tokens": max_new_tokens,
        "per_kind": per_kind,
        "kinds_skipped": kinds_skipped,
        "dtype": dtype,
        "num_threads": threads,
        "prefer_hub": prefer_hub,
        "seed": seed,
    }
    try:
        options = EvalOptions(**arguments)
    except ValueOutOfRangeError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        result = evaluate(options, output_dir=output_dir, notify=say)
    except KeyboardInterrupt:
        if output_dir is not None:
            say(f"what was measured is kept in {output_dir}; the same command goes on from there")
        raise
    if as_json:
        print_json(result.to_dict())
    else:
        _print_tables(result)


def _print_tables(result: Any) -> None:
    from ..evaluation.report import rich_table, tables
    from ..terminal import make_console

    console = make_console()
    if not console.is_terminal:  # a file has no width; keep words whole
        console.width = _FILE_WIDTH
    for table in tables(result):
        console.print(rich_table(table))
        console.print()
