"""Any checkpoint as the transformers model that trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ..errors import CheckpointError
from ..initialization import is_routing
from .checkpoint import Checkpoint, check_names
from .routing_directory import ROUTING_FILE
from .source import open_checkpoint

if TYPE_CHECKING:
    from ..modeling import FlexiDepthForCausalLM


def load_trainable(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    routing_dtype: torch.dtype | None = None,
    **arguments: Any,
) -> FlexiDepthForCausalLM:
    """The model of a directory, GGUF file, hub id, default model or routing checkpoint, in evaluation mode.

    Args:
        name, arguments: see `open_checkpoint` (routing, seed, base_model, prefer_hub, notify).
        dtype: of its parameters. routing_dtype: of routers and adapters, None = the same; float32 is what trains
            beside a base model in bfloat16.
    """
    checkpoint = open_checkpoint(name, **arguments)
    return trainable(checkpoint, dtype=dtype, routing_dtype=routing_dtype)


def trainable(
    checkpoint: Checkpoint, *, dtype: torch.dtype, routing_dtype: torch.dtype | None = None
) -> FlexiDepthForCausalLM:
    """As `load_trainable`, of an opened checkpoint."""
    from ..modeling import FlexiDepthForCausalLM

    with torch.device("meta"):  # no start values: all of them are read
        model: FlexiDepthForCausalLM = FlexiDepthForCausalLM(checkpoint.config)
    # Copied, because what is read may be a file's mapped pages.
    own = routing_dtype or dtype
    state = {
        key: tensor.to(own if is_routing(key) else dtype, copy=True)
        for key, tensor in checkpoint.tensors()
    }
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.eval()
    return model


@torch.no_grad()
def load_routing(model: FlexiDepthForCausalLM, directory: str | Path) -> None:
    """Put the routers and adapters of a routing checkpoint into a model of the same sizes.

    Raises:
        CheckpointError: damaged, or of other sizes.
    """
    stored = load_file(Path(directory) / ROUTING_FILE)
    own = {name: p for name, p in model.named_parameters() if is_routing(name)}
    check_names(directory, own, stored)
    for name, parameter in own.items():
        if parameter.shape != stored[name].shape:
            raise CheckpointError(
                f"{directory}: {name} is {list(stored[name].shape)}, this model's {list(parameter.shape)}"
            )
        parameter.copy_(stored[name])
