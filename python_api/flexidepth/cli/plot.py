"""flexidepth plot"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import command_errors

_HELP = """Draw a routing report, a benchmark, an evaluation or a training log as PNG or SVG.

A routing report comes from `generate --routing-out`, a benchmark from `bench --output-dir` or
`bench -o json`, an evaluation from `eval --output-dir` or `eval --json`, a training log is the log.json of
a stage.

Example: flexidepth plot routing.json -o routing.png
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(plot)


@command_errors
def plot(
    source: Annotated[Path, typer.Argument(help="The JSON file to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write: a .png or .svg file.")],
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Draw at most this many of the last tokens.")
    ] = 120,
) -> None:
    from ..errors import CheckpointError
    from ..plots import (
        check_figure_path,
        quality_figure,
        routing_figure,
        save_figure,
    )
    from ..routing import RoutingReport

    check_figure_path(out)
    text = source.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from error
    kind = str(content.get("format", "")) if isinstance(content, dict) else ""
    if kind.startswith("flexidepth-bench"):
        from ..bench.figures import decode_figure
        from ..bench.results_file import read_results

        print(save_figure(decode_figure(read_results(source)), out))
    elif kind.startswith("flexidepth-eval"):
        print(save_figure(quality_figure(content), out))
    elif kind.startswith("flexidepth-training"):
        from ..training.plot import training_figure

        print(save_figure(training_figure(content.get("history", [])), out))
    else:
        print(save_figure(routing_figure(RoutingReport.from_json(text), max_tokens), out))
