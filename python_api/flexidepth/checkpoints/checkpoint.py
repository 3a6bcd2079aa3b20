"""What every kind of source gives: a configuration, a stream of tensors, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..config import FlexiDepthConfig
from ..initialization import routing_shapes

TensorStream = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """An opened model.

    config: sizes and routing. source: where it came from, for messages. routers_trained: False when
    routers and adapters are only seeded.
    """

    config: FlexiDepthConfig
    source: str
    routers_trained: bool
    read_tensors: Callable[[], TensorStream]
    read_tokenizer: Callable[[], Any | None]

    def tensors(self) -> TensorStream:
        """(canonical name, tensor) pairs, one source tensor in memory at a time."""
        return self.read_tensors()

    def tokenizer(self) -> Any | None:
        """The tokenizer (a PreTrainedTokenizerFast), or None where the source has none."""
        return self.read_tokenizer()

    def nbytes_estimate(self, dtype: torch.dtype) -> int:
        """Bytes of the packed weights: matrices in `dtype`, norms, biases and routers in float32."""
        size = torch.empty((), dtype=dtype).element_size()
        total = 0
        for name, shape in expected_shapes(self.config).items():
            narrow = len(shape) == 2 and ".router." not in name
            total += prod(shape) * (size if narrow else 4)
        return total


def base_shapes(config: FlexiDepthConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the base model's tensors, in layer order."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        shapes[f"{prefix}input_layernorm.weight"] = (d,)
        for name, rows, columns, bias in (
            ("self_attn.q_proj", q, d, config.qkv_bias or config.attention_bias),
            ("self_attn.k_proj", kv, d, config.qkv_bias or config.attention_bias),
            ("self_attn.v_proj", kv, d, config.qkv_bias or config.attention_bias),
            ("self_attn.o_proj", d, q, config.attention_bias),
            ("mlp.gate_proj", f, d, config.mlp_bias),
            ("mlp.up_proj", f, d, config.mlp_bias),
            ("mlp.down_proj", d, f, config.mlp_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    return shapes


def expected_shapes(config: FlexiDepthConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of every tensor of the model."""
    shapes = base_shapes(config)
    for layer in config.routing_layers:
        shapes.update(routing_shapes(config, layer))
    return shapes
