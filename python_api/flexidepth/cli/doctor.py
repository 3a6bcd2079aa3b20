"""flexidepth doctor"""

from __future__ import annotations

import typer

from .common import command_errors, print_json
from .options import Json

_HELP = """Report what was built and what can run here; exit code 1 if something stands in the way.

Example: flexidepth doctor
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(doctor)


@command_errors
def doctor(as_json: Json = False) -> None:
    from ..doctor import collect, render

    report = collect()
    if as_json:
        print_json(report)
    else:
        print(render(report))
    raise typer.Exit(0 if report["ok"] else 1)
