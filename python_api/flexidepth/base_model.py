"""To and from transformers' own classes of the base model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .config import FlexiDepthConfig
from .errors import UnsupportedError
from .initialization import is_routing


def base_config_of(config: FlexiDepthConfig) -> Any:
    """The transformers configuration (Llama, Qwen2 or Mistral) of the base model."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    common = {
        name: getattr(config, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
    }
    rope = dict(config.rope_parameters)
    # transformers 5 reads rope_parameters, 4.57 the two older fields.
    common["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        common["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if config.base_model_type == "llama":
        return LlamaConfig(**common, attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    window = config.sliding_window
    if config.base_model_type == "mistral":
        return MistralConfig(**common, sliding_window=window)
    return Qwen2Config(
        **common, use_sliding_window=window is not None, sliding_window=window, max_window_layers=0
    )


def base_model_of(config: FlexiDepthConfig, tensors: Iterable[tuple[str, Tensor]]) -> Any:
    """transformers' own float32 model with the base weights among `tensors`; routers and adapters are left out."""
    from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

    classes = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
    model = classes[config.base_model_type](base_config_of(config))
    targets = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            if not is_routing(name):
                targets[name].copy_(tensor)
    return model.eval()


def base_state(model: Any) -> dict[str, Tensor]:
    """Canonical tensors of a transformers Llama, Qwen2 or Mistral causal LM."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    if not hasattr(model, "lm_head"):
        raise UnsupportedError(
            f"base model {kind!r} ({type(model).__name__}) has no LM head; pass a ...ForCausalLM"
        )
    state: dict[str, Tensor] = model.state_dict()
    return {
        k: v
        for k, v in state.items()
        if not (k == "lm_head.weight" and model.config.tie_word_embeddings)
    }
