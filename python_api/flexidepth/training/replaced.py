"""What an adapter stands in for: its input, and what its layer adds to the residual stream in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling import FlexiDepthForCausalLM


@dataclass(frozen=True)
class Replaced:
    """Of one layer in the base model, each [batch, tokens, d].

    y: the adapter's input when the layer is skipped. change: what the skipped part adds. out: the layer's output.
    """

    y: Tensor
    change: Tensor
    out: Tensor


@torch.no_grad()
def replaced_parts(
    model: FlexiDepthForCausalLM, layers: Sequence[Any], inputs: dict[str, Tensor]
) -> list[Replaced]:
    """Run the base model and note what the adapters of `layers` would stand in for.

    The whole layer, y the normed input of the layer; with the ablation feed_forward_only its feed-forward alone.

    Args:
        layers: some of model.routed_layers(). inputs: arguments of the model's forward pass.
    """
    through: dict[Any, tuple[Tensor, Tensor]] = {}

    def keep(module: Any, arguments: Sequence[Any], output: Any) -> None:
        through[module] = arguments[0], output if isinstance(output, Tensor) else output[0]

    fed_alone = "feed_forward_only" in model.config.ablations
    watched = [*layers, *(layer.mlp for layer in layers if fed_alone)]
    hooks = [module.register_forward_hook(keep) for module in watched]
    try:
        model.model(**inputs, use_cache=False, force_routing="dense")
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer in layers:
        h, out = through[layer]
        if fed_alone:
            y, change = through[layer.mlp]
        else:
            y, change = layer.post_attention_layernorm(h), out - h
        found.append(Replaced(y, change, out))
    return found
