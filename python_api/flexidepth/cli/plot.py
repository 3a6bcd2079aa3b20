"""flexidepth plot"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import command_errors

_HELP = """Draw a routing report (generate --routing-out) or a bench result (bench --output-dir) as PNG or SVG.

Example: flexidepth plot routing.json -o routing.png
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(plot)


@command_errors
def plot(
    source: Annotated[Path, typer.Argument(help="The JSON file to draw.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write: a .png or .svg file.")],
    max_tokens: Annotated[int, typer.Option(help="Draw at most this many last tokens.")] = 120,
) -> None:
    from ..errors import CheckpointError
    from ..plots import routing_figure, save_figure, speed_figure
    from ..routing import RoutingReport

    text = source.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from error
    is_bench = isinstance(content, dict) and str(content.get("format", "")).startswith(
        "flexidepth-bench"
    )
    figure = (
        speed_figure(content)
        if is_bench
        else routing_figure(RoutingReport.from_json(text), max_tokens)
    )
    print(save_figure(figure, out))
