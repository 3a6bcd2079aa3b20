"""GGUF as a source of base weights: configuration from its metadata, tensors dequantised one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import base_shapes
from .gguf_header import GgufHeader, TensorInfo

_ROWS_AT_ONCE = 4096  # keeps the temporaries of a large embedding small

_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_IGNORED = {"rope_freqs.weight"}


def gguf_config(header: GgufHeader, routing: dict[str, Any]) -> FlexiDepthConfig:
    """FlexiDepthConfig of a GGUF file of architecture llama or qwen2."""
    meta = header.metadata
    arch = meta.get("general.architecture")
    if arch not in ("llama", "qwen2"):
        raise UnsupportedError(f"{header.path}: GGUF architecture {arch!r} is not implemented; llama and qwen2 are")
    if "rope_freqs.weight" in header.tensors:
        raise UnsupportedError(
            f"{header.path}: llama3 rope scaling is stored as factors in GGUF, which is not implemented; "
            "use the Hugging Face checkpoint of this model"
        )

    def need(key: str) -> Any:
        if f"{arch}.{key}" not in meta:
            raise CheckpointError(f"{header.path}: metadata lacks {arch}.{key}")
        return meta[f"{arch}.{key}"]

    heads = need("attention.head_count")
    return FlexiDepthConfig(
        base_model_type=arch,
        vocab_size=_info(header, "token_embd.weight").shape[0],
        hidden_size=need("embedding_length"),
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta.get(f"{arch}.attention.head_count_kv", heads),
        head_dim=meta.get(f"{arch}.attention.key_length"),
        max_position_embeddings=need("context_length"),
        rms_norm_eps=float(need("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(meta.get(f"{arch}.rope.freq_base", 10000.0))},
        qkv_bias=arch == "qwen2",
        tie_word_embeddings="output.weight" not in header.tensors,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
        **routing,
    )


def gguf_tensors(header: GgufHeader, config: FlexiDepthConfig) -> Iterator[tuple[str, Tensor]]:
    """Base weights as float32, in layer order. The file is read piece by piece and never mapped."""
    found = {_canonical(name): info for name, info in header.tensors.items() if name not in _IGNORED}
    wanted = base_shapes(config)
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        raise CheckpointError(f"{header.path}: missing tensors {missing[:10]}, unexpected tensors {unexpected[:10]}")
    with header.path.open("rb") as file:
        for name, shape in wanted.items():
            info = found[name]
            if info.shape != shape:
                raise CheckpointError(f"{header.path}: {info.name} is {list(info.shape)}; its metadata say {list(shape)}")
            tensor = _read(file, info)
            if config.base_model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = _unpermute(tensor, config.head_dim)
            yield name, tensor


def _info(header: GgufHeader, name: str) -> TensorInfo:
    if name not in header.tensors:
        raise CheckpointError(f"{header.path}: tensor {name} is missing")
    return header.tensors[name]


def _canonical(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _IN_LAYER:
        return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.{parts[3]}"
    return name


def _read(file: BinaryIO, info: TensorInfo) -> Tensor:
    rows = info.shape[0] if len(info.shape) == 2 else 1
    row_bytes = info.nbytes // rows
    out = np.empty((rows, info.shape[-1]), dtype=np.float32)
    file.seek(info.offset)
    for start in range(0, rows, _ROWS_AT_ONCE):
        count = min(_ROWS_AT_ONCE, rows - start)
        raw = np.frombuffer(file.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
        out[start : start + count] = dequantize(raw, info.kind)
    return torch.from_numpy(out).reshape(info.shape)


def _unpermute(weight: Tensor, head_dim: int) -> Tensor:
    """llama.cpp interleaves the two rotary halves of each head's rows; put them back one after the other."""
    columns = weight.shape[1]
    return weight.view(-1, head_dim // 2, 2, columns).transpose(1, 2).reshape(-1, columns)
