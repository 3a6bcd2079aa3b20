"""A trained routing as the package ships it: `python -m flexidepth.bench.shipped_form RUN/STAGE/routing OUT`.

Training keeps float32, with which it goes on; what is shipped has adapters in bfloat16, as the engine holds them, and
routers in float16, half the bytes. Gates move with the rounding, so a calibration from before is left out: calibrate
what this writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import CheckpointError


@command_errors
def main(
    routing: Annotated[Path, typer.Argument(help="A directory of routers and adapters alone.")],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
) -> None:
    """Round a routing checkpoint to the types in which the default model's is shipped."""
    import torch

    from flexidepth.checkpoints import load_trainable, save_routing
    from flexidepth.checkpoints.routing_directory import (
        BASE_MODEL,
        BASE_PRINT,
        ROUTING_FILE,
        is_routing_directory,
        routing_content,
    )

    if not is_routing_directory(routing):
        raise CheckpointError(
            f"{routing}: no routing checkpoint; wanted a directory with {ROUTING_FILE} and no base model, as "
            "`flexidepth train` writes"
        )
    content = routing_content(routing)
    model = load_trainable(routing)
    model.config.calibration, model.config.skip_presets = [], {}
    written = save_routing(
        model,
        out,
        base_model=content[BASE_MODEL],
        dtype=torch.bfloat16,
        router_dtype=torch.float16,
        fingerprint=content[BASE_PRINT],
    )
    before, after = ((p / ROUTING_FILE).stat().st_size / 1e6 for p in (routing, written))
    say(f"wrote {written}: {after:.1f} MB of {before:.1f}; calibrate it next")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
