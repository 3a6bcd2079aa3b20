"""What every kind of source gives: a configuration, a stream of tensors, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import CheckpointError
from ..initialization import initial_tensor, routing_shapes

Shapes = dict[str, tuple[int, ...]]
Rows = Mapping[str, Sequence[int]]
TensorStream = Iterator[tuple[str, Tensor]]
NAMES_SHOWN = 10


class ReadTensors(Protocol):
    """Gives tensors for a sequence of canonical names, and of a name in `rows` these rows alone."""

    def __call__(self, names: Iterable[str], rows: Rows | None = None) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened model.

    config: sizes and routing. source: where it came from, for messages. routers_trained: False when
    routers and adapters are only seeded. read_stored: gives the tensors that the source itself holds, whole
    or some of their rows. base: where the base model came from, if from somewhere else than `source`.
    """

    config: FlexiDepthConfig
    source: str
    routers_trained: bool
    read_tensors: Callable[[], TensorStream]
    read_tokenizer: Callable[[], Any | None]
    read_stored: ReadTensors
    base: str | None = None

    def tensors(self) -> TensorStream:
        """(canonical name, tensor) pairs in layer order, one source tensor in memory at a time."""
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


def expected_shapes(config: FlexiDepthConfig, *, routing: bool = True) -> Shapes:
    """Canonical names and shapes in layer order; without `routing` those of the base model alone."""
    routed = set(config.routing_layers) if routing else set()
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes.update(_layer_shapes(config, layer))
        if layer in routed:
            shapes.update(routing_shapes(config, layer))
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def all_routing_shapes(config: FlexiDepthConfig) -> Shapes:
    """Canonical names and shapes of all routers and adapters, in layer order."""
    shapes: Shapes = {}
    for layer in config.routing_layers:
        shapes.update(routing_shapes(config, layer))
    return shapes


def _layer_shapes(config: FlexiDepthConfig, layer: int) -> Shapes:
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    qkv_bias = config.qkv_bias or config.attention_bias
    prefix = f"model.layers.{layer}."
    shapes: Shapes = {f"{prefix}input_layernorm.weight": (d,)}
    for name, rows, columns, bias in (
        ("self_attn.q_proj", q, d, qkv_bias),
        ("self_attn.k_proj", kv, d, qkv_bias),
        ("self_attn.v_proj", kv, d, qkv_bias),
        ("self_attn.o_proj", d, q, config.attention_bias),
    ):
        shapes.update(_linear(prefix + name, rows, columns, bias))
    shapes[f"{prefix}post_attention_layernorm.weight"] = (d,)
    for name, rows, columns in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
        shapes.update(_linear(f"{prefix}mlp.{name}", rows, columns, config.mlp_bias))
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return {**weight, f"{name}.bias": (rows,)} if bias else weight


def stream(
    config: FlexiDepthConfig,
    read: Callable[[Iterable[str]], Iterator[Tensor]],
    *,
    routed: bool,
    seed: int,
) -> TensorStream:
    """All tensors of the model in layer order.

    Args:
        read: gives the source's tensors for a sequence of canonical names.
        routed: whether the source has routers and adapters; if not they are seeded with `seed`.
    """
    stored = expected_shapes(config, routing=routed)
    values = read(stored)
    for name, shape in expected_shapes(config).items():
        yield name, next(values) if name in stored else initial_tensor(name, shape, config, seed)


def some_rows(name: str, tensor: Tensor, rows: Rows | None) -> Tensor:
    """What a ReadTensors gives of a tensor that is in memory already."""
    return tensor if rows is None or name not in rows else tensor[list(rows[name])]


def check_names(where: object, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """CheckpointError naming the tensors that are missing and those that have no place in the model."""
    missing = [name for name in wanted if name not in found]
    unexpected = sorted(name for name in found if name not in wanted)
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors missing ({shorten(missing)}), {len(unexpected)} unexpected "
            f"({shorten(unexpected)}); the configuration and the weights do not belong together"
        )


def shorten(names: list[str]) -> str:
    """The first names of a list, and how many follow."""
    rest = len(names) - NAMES_SHOWN
    return (
        ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
        if names
        else "none"
    )


def check_finite(name: str, tensor: Tensor) -> None:
    """CheckpointError with the count and the first place of NaN and infinity in `tensor`."""
    # A sum is finite only if every value is, and needs no mask as large as the tensor; it can also
    # overflow over finite values, hence the exact look afterwards.
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return
    wrong = torch.nonzero(~torch.isfinite(tensor))
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise CheckpointError(
            f"{name}: {len(wrong)} of {tensor.numel()} values are not finite, the first at {list(place)} "
            f"({tensor[place].item()}); the file is damaged or its training diverged"
        )
