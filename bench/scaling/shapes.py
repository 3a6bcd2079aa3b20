"""The models of the study: the last half of the layers routed, adapter ffn/16 and router d/16, as in the paper."""

from __future__ import annotations

from typing import Any

from flexidepth.config import FlexiDepthConfig

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama-3-70b": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
    # Not studied: published dense figures exist for it.
    "llama-2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip
STUDIED = ("smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-3-70b")
ADAPTER_FACTORS = (16, 8, 4, 2, 32)  # intermediate size over the adapter's; the paper's first


def shape_config(name: str, adapter_factor: int = 16) -> FlexiDepthConfig:
    """The configuration of a model of SHAPES with adapters of ffn / adapter_factor. KeyError for another name."""
    return FlexiDepthConfig(**SHAPES[name], adapter_reduction_factor=adapter_factor)
