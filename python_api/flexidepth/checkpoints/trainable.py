"""Any checkpoint as the transformers model that trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .source import open_checkpoint

if TYPE_CHECKING:
    from ..modeling import FlexiDepthForCausalLM


def load_trainable(
    name: str | Path, *, dtype: torch.dtype = torch.float32, **arguments: Any
) -> FlexiDepthForCausalLM:
    """The model of a directory, GGUF file, hub id, default model or routing checkpoint, in evaluation mode.

    Args:
        name, arguments: see `open_checkpoint` (routing, seed, base_model, prefer_hub, notify).
        dtype: of all its parameters.
    """
    from ..modeling import FlexiDepthForCausalLM

    checkpoint = open_checkpoint(name, **arguments)
    with torch.device("meta"):  # no start values: all of them are read
        model: FlexiDepthForCausalLM = FlexiDepthForCausalLM(checkpoint.config)
    # Copied, because what is read may be a file's mapped pages.
    state = {key: tensor.to(dtype, copy=True) for key, tensor in checkpoint.tensors()}
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.eval()
    return model
