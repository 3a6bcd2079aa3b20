"""Tiny models in every layout the package reads, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
# transformers name -> GGUF name, inside a layer; after llama.cpp's gguf-py constants
GGUF_NAMES = {
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
MERGES = [
    "1 2",
    "12 3",
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ hello",
    "' s",
    "Ċ Ċ",
    "Ġ Ġ",
    "Ã ©",
    "c a",
    "( ca",
    "; Ċ",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool>"]
WHOLE = ["wow"]  # no merge leads there
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def rope_arguments(parameters: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a transformers configuration: 5 has one field, 4 has two."""
    if "rope_parameters" in LlamaConfig().to_dict():
        return {"rope_parameters": parameters}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = scaling == {"rope_type": "default"}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": None if plain else scaling}


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def base_model(kind: str = "llama", **changes: Any) -> Any:
    """A transformers model with weights large enough for logits to tell mistakes apart."""
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(7)
    model = model_class(config_class(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    return model


def save_base(
    folder: Path, kind: str = "llama", *, max_shard_size: str = "1GB", **changes: Any
) -> Any:
    """Save such a model the way transformers does; returns the model."""
    model = base_model(kind, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def state(model: Any) -> dict[str, torch.Tensor]:
    """Its tensors without the tied copy of the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def gguf_vocabulary() -> tuple[list[str], list[int]]:
    """(tokens, token types): bytes, merged tokens, specials; types as in the GGUF specification."""
    plain = (
        sorted(pre_tokenizers.ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES] + WHOLE
    )
    tokens = SPECIAL + plain + USER_DEFINED
    kinds = [3] * len(SPECIAL) + [1] * len(plain) + [4] * len(USER_DEFINED)
    missing = SIZES["vocab_size"] - len(tokens)
    return tokens + [f"<unused{i}>" for i in range(missing)], kinds + [5] * missing


def add_tokenizer(writer: gguf.GGUFWriter, pre: str = "smollm", model: str = "gpt2") -> None:
    """Write the vocabulary above as byte-level BPE; for model "llama" one of SentencePiece."""
    if model == "llama":
        add_sentencepiece(writer)
        return
    tokens, kinds = gguf_vocabulary()
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """Write a vocabulary as the converter does for Llama 2: specials, bytes, then pieces by falling score."""
    pieces = [
        "▁▁",
        "he",
        "ll",
        "hell",
        "hello",
        "▁hello",
        "ca",
        "▁ca",
        "fé",
        "café",
        "▁w",
        "or",
        "▁wor",
    ]
    pieces += ["12", "er", "<s", *"▁helocafé12wr<s>\n"]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        "<tool>",
    ]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4]
    missing = SIZES["vocab_size"] - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + [f"<unused{i}>" for i in range(missing)])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) + missing - 259)])
    writer.add_token_types(kinds + [5] * missing)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def write_gguf(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    arch: str | None = None,
    pre: str = "smollm",
    tokenizer: str = "gpt2",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    omit: tuple[str, ...] = (),
) -> Path:
    """Write a transformers model as llama.cpp's converter does.

    kind: type of the matrices. metadata: extra values, {key: number or string}. tensors: extra tensors.
    omit: GGUF names to leave out.
    """
    config = model.config
    arch = arch or config.model_type
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_theta(config))
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[
            type(value)
        ]
        add(key, value)
    add_tokenizer(writer, pre, tokenizer)
    for name, tensor in state(model).items():
        values = tensor.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            values = permute(values, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            values = permute(values, config.num_key_value_heads)
        if gguf_name(name) not in omit:
            _add(writer, gguf_name(name), values, kind)
    for name, values in (tensors or {}).items():
        _add(writer, name, values, gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(values: np.ndarray, heads: int) -> np.ndarray:
    """The order of rotary rows in llama.cpp: the halves of each head interleaved."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def gguf_name(name: str) -> str:
    """GGUF name of a transformers name."""
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, suffix = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{suffix}"


def _add(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType
) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values.astype(np.float32))
    else:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
