"""flexidepth train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import command_errors, say

_HELP = """Train routers and adapters on a frozen base model.

RECIPE is a YAML file, or the name of one that comes with the package. Files given here take the place of the
recipe's own; --set changes any other value in it. A run that was stopped goes on with --resume.

Example: flexidepth train smollm2-135m --train texts.jsonl --held-out held.jsonl --output-dir run

On several GPUs: accelerate launch -m flexidepth train smollm2-135m ...
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(train)


@command_errors
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    output_dir: Annotated[Path, typer.Option(help="Where checkpoints and logs go.")],
    train: Annotated[
        list[str] | None, typer.Option(help="Text to train on: .jsonl, .txt or a datasets folder.")
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="Text to evaluate on while training.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Another base model than the recipe's.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="A routing checkpoint to go on from, instead of seeded routers."),
    ] = None,
    target_layers_skipped: Annotated[
        float | None,
        typer.Option(help="Steer the penalty until tokens skip so many layers on average."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE in the recipe: batch_size=1, stages.NAME.tokens=40960, ..."
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Pass over broken lines instead of stopping.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output directory.")
    ] = False,
) -> None:
    try:
        from ..training.command import changed_recipe, find_recipe, train_recipe
        from ..training.processes import all_processes
    except ModuleNotFoundError as error:
        from ..errors import UnsupportedError

        raise UnsupportedError(
            f'train: this needs the package {error.name}; install it with pip install "flexidepth[train]"'
        ) from error

    chosen = changed_recipe(
        find_recipe(recipe),
        train=train,
        held_out=held_out,
        skip_broken=skip_broken or None,
        base_model=base_model,
        start=start,
        target_layers_skipped=target_layers_skipped,
        settings=set_ or [],
    )
    try:
        result = train_recipe(chosen, output_dir, resume=resume, notify=say)
    except KeyboardInterrupt:
        if output_dir.is_dir():
            say(f"{output_dir} holds the last checkpoint; the same command with --resume goes on")
        raise
    if all_processes().is_main_process:
        say(f"thresholds for numbers of layers skipped: flexidepth calibrate {result} --data TEXT")
        print(result)
