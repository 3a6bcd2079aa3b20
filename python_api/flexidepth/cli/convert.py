"""flexidepth convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import command_errors, say

_HELP = """Make a FlexiDepth checkpoint: a base model with seeded routers and adapters.

Example: flexidepth convert smollm2-135m my-model --layers 15-29 --seed 0
"""
_DTYPES = ("bfloat16", "float32", "float16")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(convert)


def parse_layers(text: str) -> list[int]:
    """Layers out of "15-29" or "3,5,7-9"."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        raise typer.BadParameter(
            f"--layers {text!r}: wanted something like 15-29 or 3,5,7-9"
        ) from None
    return layers


@command_errors
def convert(
    base: Annotated[
        str, typer.Argument(help="A directory, a .gguf file, a hub id, or smollm2-135m.")
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    layers: Annotated[
        str | None, typer.Option(help="Routed layers, as 15-29; default: the last half.")
    ] = None,
    router_reduction_factor: Annotated[
        int, typer.Option(help="Router width = hidden size / this.")
    ] = 16,
    adapter_reduction_factor: Annotated[
        int, typer.Option(help="Adapter width = intermediate size / this.")
    ] = 16,
    router_order: Annotated[str, typer.Option(help="norm_tanh or tanh_norm.")] = "norm_tanh",
    router_bias: Annotated[bool, typer.Option(help="Give the router's logit a bias.")] = False,
    gate: Annotated[str, typer.Option(help="multiplier or straight_through.")] = "multiplier",
    threshold: Annotated[
        float, typer.Option(help="Run a layer when its gate is above this.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of routers and adapters.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    layout: Annotated[
        str, typer.Option(help="flexidepth, or ddllama (the released layout).")
    ] = "flexidepth",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing directory.")
    ] = False,
) -> None:
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: wanted {', '.join(_DTYPES)}")
    import torch

    from ..checkpoints import convert as convert_checkpoint

    routing: dict[str, Any] = {
        "router_reduction_factor": router_reduction_factor,
        "adapter_reduction_factor": adapter_reduction_factor,
        "router_order": router_order,
        "router_bias": router_bias,
        "gate": gate,
        "router_thresholds": threshold,
    }
    if layers is not None:
        routing["routing_layers"] = parse_layers(layers)
    written = convert_checkpoint(
        base,
        out,
        routing=routing,
        seed=seed,
        dtype=getattr(torch, dtype),
        layout=layout,
        overwrite=overwrite,
        notify=say,
    )
    print(written)
