"""flexidepth merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import command_errors, say
from .options import BaseModel, PreferHub

_HELP = """Put a routing checkpoint and its base model together into one directory.

The result is an ordinary model directory that needs no other.

Example: flexidepth merge my-routing my-model
"""
_DTYPES = ("bfloat16", "float32", "float16")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(merge)


@command_errors
def merge(
    routing: Annotated[
        str, typer.Argument(help="A directory of routers and adapters alone, or smollm2-135m.")
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing directory.")
    ] = False,
    base_model: BaseModel = None,
    prefer_hub: PreferHub = False,
) -> None:
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: wanted {', '.join(_DTYPES)}")
    from ..checkpoints import merge as merge_checkpoint

    written = merge_checkpoint(
        routing,
        out,
        base_model=base_model,
        dtype=dtype,
        overwrite=overwrite,
        prefer_hub=prefer_hub,
        notify=say,
    )
    print(written)
