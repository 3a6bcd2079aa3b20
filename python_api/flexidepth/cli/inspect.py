"""flexidepth inspect"""

from __future__ import annotations

from math import prod
from typing import Any

import typer

from .common import Json, Model, command_errors, print_json, say

_HELP = """Show what a model is made of and what a token costs.

Example: flexidepth inspect smollm2-135m
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(inspect)


@command_errors
def inspect(model: Model, as_json: Json = False) -> None:
    from ..checkpoints import open_checkpoint

    checkpoint = open_checkpoint(model, notify=say)
    facts = describe(checkpoint)
    if as_json:
        print_json(facts)
        return
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):28} {value}")


def describe(checkpoint: Any) -> dict[str, Any]:
    """Facts about an opened checkpoint as plain values."""
    from ..bench.ideal import bytes_per_token
    from ..checkpoints.checkpoint import expected_shapes

    config = checkpoint.config
    parts = {"base": 0, "routers": 0, "adapters": 0}
    for name, shape in expected_shapes(config).items():
        parts[
            "routers" if ".router." in name else "adapters" if ".adapter." in name else "base"
        ] += prod(shape)
    routed = config.num_routed_layers
    return {
        "source": checkpoint.source,
        "base_model_type": config.base_model_type,
        "layers": config.num_hidden_layers,
        "routing_layers": list(config.routing_layers),
        "routers": "trained"
        if checkpoint.routers_trained
        else "seeded, not trained"
        if routed
        else "none",
        "router_order": config.router_order,
        "gate": config.gate,
        "thresholds": list(config.router_thresholds),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
        "parameters_base": parts["base"],
        "parameters_routers": parts["routers"],
        "parameters_adapters": parts["adapters"],
        "bytes_per_token_bf16_dense": bytes_per_token(config, 0, routers=False),
        "bytes_per_token_bf16_all_run": bytes_per_token(config, 0),
        "bytes_per_token_bf16_all_skipped": bytes_per_token(config, routed),
    }
