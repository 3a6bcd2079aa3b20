"""A transformers model as a GGUF file without a vocabulary: weights and sizes for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexidepth.base_model import base_state

# transformers' name -> GGUF's: outside the layers, and in "model.layers.N." / "blk.N."
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"


def write_base_gguf(path: Path, model: Any, dtype: torch.dtype) -> None:
    """Write a transformers Llama, Qwen2 or Mistral causal LM, matrices in `dtype` (float32 or bfloat16)."""
    import gguf

    config = model.config
    arch = "qwen2" if config.model_type == "qwen2" else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = _head_dim(config)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    theta = _rope_theta(config)
    writer.add_rope_freq_base(theta)
    bfloat16 = gguf.GGMLQuantizationType.BF16
    for name, tensor in _tensors(model, arch, theta):
        if tensor.ndim == 2 and dtype == torch.bfloat16:
            bits = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=bfloat16)
        else:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: Any, arch: str, theta: float) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and tensors; of "llama" the rotary rows in llama.cpp's order."""
    config = model.config
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    factors = _rope_factors(model, theta)
    if not bool(torch.all(factors == 1)):
        yield _ROPE_FACTORS, factors
    for name, tensor in base_state(model).items():
        stem, kind = name.rsplit(".", 1)
        if stem in _TOP:
            yield f"{_TOP[stem]}.{kind}", tensor.detach().cpu()
            continue
        _, _, layer, inner = stem.split(".", 3)
        values = tensor.detach().cpu()
        if arch == "llama" and inner in heads:
            values = _interleaved(values, heads[inner])
        yield f"blk.{layer}.{_LAYER[inner]}.{kind}", values


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * head_dim, ...] with the two halves of each head interleaved."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _rope_factors(model: Any, theta: float) -> Tensor:
    """What llama.cpp divides each rotary frequency by, [head_dim / 2]; ones for plain rotary embedding."""
    head_dim = _head_dim(model.config)
    plain = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    used = model.model.rotary_emb.inv_freq.detach().cpu().double()
    factors = torch.from_numpy(plain) / used
    rounded = torch.where((factors - 1).abs() < 1e-5, torch.ones_like(factors), factors)
    return rounded.float()


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rope_theta(config: Any) -> float:
    # transformers 5 keeps it in rope_parameters, 4.57 by itself
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)
