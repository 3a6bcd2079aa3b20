"""FlexiDepthConfig out of the metadata of a GGUF file."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import CheckpointError, UnsupportedError
from .gguf_header import GgufHeader

ARCHITECTURES = ("llama", "qwen2")
# What every Llama 3.1, 3.2 and 3.3 has; GGUF stores only the resulting factor per frequency.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_config(
    header: GgufHeader, routing: dict[str, Any], rope_factors: Tensor | None
) -> FlexiDepthConfig:
    """Configuration of a GGUF file of architecture llama or qwen2.

    Args:
        routing: routing arguments of FlexiDepthConfig.
        rope_factors: the file's rope_freqs tensor [head_dim / 2] where it has one.

    Raises:
        UnsupportedError: another architecture or variant. CheckpointError: metadata missing or malformed.
    """
    path, meta = header.path, header.metadata
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedError(
            f"{path}: GGUF architecture {arch!r} is not implemented; {' and '.join(ARCHITECTURES)} are"
        )
    if meta.get(f"{arch}.expert_count", 0):
        raise UnsupportedError(f"{path}: mixtures of experts are not implemented")

    def number(key: str, default: float | None = None) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        if isinstance(value, list):
            raise UnsupportedError(
                f"{path}: {arch}.{key} differs from layer to layer, which is not implemented"
            )
        if not isinstance(value, (int, float)) or value <= 0:
            raise CheckpointError(
                f"{path}: metadata {arch}.{key} is {value!r}; a positive number is wanted"
            )
        return value

    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing")
    heads, d = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", d // heads)
    if number("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError(f"{path}: partial rotary embedding is not implemented")
    theta = float(number("rope.freq_base", 10000.0))
    return FlexiDepthConfig(
        base_model_type=arch,
        vocab_size=header.tensors["token_embd.weight"].shape[0],
        hidden_size=d,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=float(number("attention.layer_norm_rms_epsilon")),
        rope_parameters=_rope(header, arch, theta, rope_factors),
        attention_bias="blk.0.attn_output.bias" in header.tensors,
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
        tie_word_embeddings="output.weight" not in header.tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=_ends(meta),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
        **routing,
    )


def _ends(meta: dict[str, Any]) -> int | list[int] | None:
    """End of text, and end of turn where that is another token."""
    ids = [meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    different = list(dict.fromkeys(i for i in ids if i is not None))
    return different if len(different) > 1 else (different[0] if different else None)


def _rope(header: GgufHeader, arch: str, theta: float, factors: Tensor | None) -> dict[str, Any]:
    kind = header.metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UnsupportedError(
            f"{header.path}: rope scaling {kind!r} is not implemented; linear and llama3 are"
        )
    if kind == "linear":
        factor = float(header.metadata.get(f"{arch}.rope.scaling.factor", 1.0))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if factors is None:
        return {"rope_type": "default", "rope_theta": theta}
    # The low frequencies are divided by the scaling factor itself, so it is the largest of all.
    scaling = {"factor": float(factors.max()), **_LLAMA3}
    if not torch.allclose(
        factors, _llama3_factors(len(factors), theta, scaling["factor"]), rtol=1e-4
    ):
        raise UnsupportedError(
            f"{header.path}: its rope factors {factors[:3].tolist()}..{factors[-3:].tolist()} are not those "
            "of Llama 3; use the Hugging Face checkpoint of this model"
        )
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


def _llama3_factors(count: int, theta: float, factor: float) -> Tensor:
    """What llama3 scaling divides each rotary frequency by [count]; after the Llama 3.1 reference."""
    wavelength = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) / count)
    turns = _LLAMA3["original_max_position_embeddings"] / wavelength
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
