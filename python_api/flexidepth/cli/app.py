"""The command and what is common to its parts: errors, exit codes, version."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from . import (
    bench,
    calibrate,
    chat,
    convert,
    demo,
    distill_data,
    doctor,
    eval,
    generate,
    inspect,
    make_prompts,
    merge,
    plot,
    train,
)
from .common import DEBUG_VARIABLE

_HELP = """Adaptive layer skipping in language models that is really faster.

Exit codes: 0 done, 1 error (one line on standard error), 2 wrong usage, 130 interrupted.

Example: flexidepth demo
"""

app = typer.Typer(
    name="flexidepth",
    help=_HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"flexidepth {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (before the command).")
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


_COMMANDS = (
    demo,
    generate,
    chat,
    bench,
    eval,
    train,
    calibrate,
    convert,
    merge,
    make_prompts,
    distill_data,
    inspect,
    plot,
    doctor,
)
for module in _COMMANDS:
    module.register(app)


def main() -> None:
    """Entry point."""
    # Results are text in whatever language the model speaks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    app(prog_name="flexidepth")
