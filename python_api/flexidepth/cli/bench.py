"""flexidepth bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import command_errors, say
from .options import DType, Json, Model, PreferHub

_HELP = """Tokens per second against layers skipped, beside our dense pass, the ideal and the peers.

Prompt (pp) and decode (tg) are measured apart, all cases in turn in one run.

Example: flexidepth bench smollm2-135m --threads 1,2 --skip all --peers --output-dir results
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(bench)


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{name} {text!r}: wanted numbers separated by commas") from None


@command_errors
def bench(
    model: Model = "smollm2-135m",
    prompt: Annotated[
        int, typer.Option("--prompt", "-p", help="Prompt length (pp); 0 = none.")
    ] = 512,
    steps: Annotated[
        int,
        typer.Option(
            "--gen",
            "-n",
            help="Decode steps timed per case (tg), spread over the rounds; 0 = none.",
        ),
    ] = 128,
    depth: Annotated[
        int, typer.Option("--depth", "-d", help="Tokens in the cache before decoding.")
    ] = 128,
    skip: Annotated[
        str,
        typer.Option(help="Layers skipped per token: 0,4,8, or all of these numbers, or quarters."),
    ] = "quarters",
    shares: Annotated[
        str, typer.Option(help="Per cent of the routed layers that prompt tokens skip.")
    ] = "0,50,100",
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", help="1,2 and so on; default: all.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Time transformers and llama.cpp in the same run.")
    ] = False,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Also compare with the float32 reference.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Turns through all cases.")] = 8,
    dtype: DType = "auto",
    prefer_hub: PreferHub = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="md, csv or json on standard output.")
    ] = "md",
    as_json: Json = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write JSON, Markdown and a plot here.")
    ] = None,
) -> None:
    from ..bench.options import BenchOptions
    from ..bench.results_folder import check_folder
    from ..bench.run import render, run_bench, write_results
    from ..errors import ValueOutOfRangeError

    if output not in ("md", "csv", "json"):
        raise typer.BadParameter(f"--output {output!r}: wanted md, csv or json")
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "prompt": prompt,
        "steps": steps,
        "depth": depth,
        "skips": skip if skip in ("all", "quarters") else _numbers(skip, "--skip"),
        "shares": [n / 100 for n in _numbers(shares, "--shares")],
        "threads": None if threads is None else _numbers(threads, "--threads"),
        "rounds": rounds,
        "peers": peers,
        "accuracy": accuracy,
        "prefer_hub": prefer_hub,
    }
    try:
        options = BenchOptions(**arguments)
    except ValueOutOfRangeError as error:
        raise typer.BadParameter(str(error)) from None
    if output_dir is not None:
        check_folder(output_dir)
    result = run_bench(options, say)
    print(render(result, "json" if as_json else output))
    if output_dir is not None:
        for path in write_results(result, output_dir):
            say(f"wrote {path}")
