"""A model's configuration as the compiled engines take it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from flexidepth.config import FlexiDepthConfig

DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS: dict[str, int] = {"norm_tanh": 0, "tanh_norm": 1}


def shape_of(config: FlexiDepthConfig, dtype: torch.dtype, strict_router: bool) -> dict[str, Any]:
    """Sizes and switches of csrc/engine/model_shape.h."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.sliding_window or 0,
        "router_dim": config.router_dim,
        "adapter_dim": config.adapter_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "tied_embeddings": config.tie_word_embeddings,
        "qkv_bias": config.qkv_bias or config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "router_bias": config.router_bias,
        "straight_through": config.gate == "straight_through",
        "strict_router": strict_router,
        "router_order": ORDERS[config.router_order],
        "dtype": DTYPES[dtype],
        "routing_layers": list(config.routing_layers),
        "thresholds": [float(t) for t in config.router_thresholds],
        "inv_freq": config.rope_inv_freq(),
    }
