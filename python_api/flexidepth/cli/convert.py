"""flexidepth convert"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import command_errors, say
from .options import MODEL_HELP, BaseModel, PreferHub

_HELP = """Make a FlexiDepth checkpoint: a base model with seeded routers and adapters.

Routers and adapters that the source already has are kept, with its routing where no option says
otherwise.

Example: flexidepth convert smollm2-135m my-model --layers 15-29 --seed 0
"""
_DTYPES = ("bfloat16", "float32", "float16")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(convert)


def parse_layers(text: str) -> list[int]:
    """Layers out of "15-29", "3,5,7-9" or "none"."""
    if text == "none":
        return []
    layers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            start, stop = int(first), int(last or first)
            if stop < start:
                raise ValueError(part)
            layers += range(start, stop + 1)
    except ValueError:
        raise typer.BadParameter(
            f"--layers {text!r}: wanted something like 15-29, 3,5,7-9 or none"
        ) from None
    return layers


@command_errors
def convert(
    base: Annotated[str, typer.Argument(help=MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="The directory to write.")],
    layers: Annotated[
        str | None, typer.Option(help="Routed layers, as 15-29; default: the last half.")
    ] = None,
    router_reduction_factor: Annotated[
        int | None, typer.Option(help="Router width = hidden size / this; default 16.")
    ] = None,
    adapter_reduction_factor: Annotated[
        int | None, typer.Option(help="Adapter width = intermediate size / this; default 16.")
    ] = None,
    router_order: Annotated[
        str | None, typer.Option(help="norm_tanh (default) or tanh_norm.")
    ] = None,
    router_bias: Annotated[
        bool | None,
        typer.Option("--router-bias/--no-router-bias", help="A bias on the router's logit."),
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="multiplier (default) or straight_through.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Run a layer when its gate is above this; default 0.5.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of routers and adapters; default: 0, for smollm2-135m its trained ones."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    layout: Annotated[
        str, typer.Option(help="flexidepth, or ddllama (the released layout).")
    ] = "flexidepth",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing directory.")
    ] = False,
    prefer_hub: PreferHub = False,
    base_model: BaseModel = None,
) -> None:
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r}: wanted {', '.join(_DTYPES)}")
    routing: dict[str, Any] = {
        "routing_layers": None if layers is None else parse_layers(layers),
        "router_reduction_factor": router_reduction_factor,
        "adapter_reduction_factor": adapter_reduction_factor,
        "router_order": router_order,
        "router_bias": router_bias,
        "gate": gate,
        "router_thresholds": threshold,
    }
    from ..checkpoints import convert as convert_checkpoint

    written = convert_checkpoint(
        base,
        out,
        routing={name: value for name, value in routing.items() if value is not None},
        seed=seed,
        dtype=dtype,
        layout=layout,
        overwrite=overwrite,
        prefer_hub=prefer_hub,
        base_model=base_model,
        notify=say,
    )
    print(written)
