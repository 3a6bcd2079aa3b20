"""Models to measure: real checkpoints, and known shapes with random weights that are made where they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from flexidepth.checkpoints import Checkpoint, open_checkpoint
from flexidepth.checkpoints.checkpoint import Rows, expected_shapes, some_rows
from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import ValueOutOfRangeError
from flexidepth.initialization import initial_routing

_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 1024, "routing_layers": [2, 3], "router_reduction_factor": 4,
        "adapter_reduction_factor": 4,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "max_position_embeddings": 8192, "routing_layers": list(range(15, 30)),
        "tie_word_embeddings": True, "adapter_reduction_factor": 8,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64,
        "max_position_embeddings": 8192, "routing_layers": list(range(12, 24)),
        "tie_word_embeddings": True, "qkv_bias": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 8192, "routing_layers": list(range(8, 16)),
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 8192, "routing_layers": list(range(16, 32)),
        "tie_word_embeddings": False,
    },
}  # fmt: skip
NAMES = tuple(_SHAPES)
RANDOM = "random:"


def open_model(
    name: str, *, prefer_hub: bool = False, notify: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """What `open_checkpoint` opens, or, as "random:NAME", a shape of NAMES with random bfloat16 weights."""
    if not name.startswith(RANDOM):
        return open_checkpoint(name, prefer_hub=prefer_hub, notify=notify)
    shape = name.removeprefix(RANDOM)
    if shape not in _SHAPES:
        raise ValueOutOfRangeError(f"bench: no shape {shape!r}; wanted one of {', '.join(NAMES)}")
    config = model_config(shape)

    def read(names: Iterable[str], rows: Rows | None = None) -> Iterator[Tensor]:
        wanted, weights = set(names), random_weights(config, torch.bfloat16, "cpu")
        return (some_rows(n, t, rows) for n, t in weights if n in wanted)

    return Checkpoint(
        config=config,
        source=name,
        routers_trained=False,
        read_tensors=lambda: random_weights(config, torch.bfloat16, "cpu"),
        read_tokenizer=lambda: None,
        read_stored=read,
    )


def model_config(name: str) -> FlexiDepthConfig:
    """The configuration of a model of NAMES, the later half of its layers routed."""
    return FlexiDepthConfig(**_SHAPES[name])


def random_weights(
    config: FlexiDepthConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Weights whose products neither grow nor vanish, and routers whose gates spread; (name, tensor) pairs."""
    generator = torch.Generator(device).manual_seed(seed)
    routing = dict(initial_routing(config, seed))
    for name, shape in expected_shapes(config).items():
        if ".router." in name and name in routing:
            yield name, routing[name].to(device)
        elif name.endswith(".bias"):
            yield name, torch.randn(shape, generator=generator, device=device).mul_(0.02)
        elif len(shape) == 1:
            yield name, torch.ones(shape, device=device)
        else:
            made = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            yield name, made.mul_(shape[1] ** -0.5)


def skip_masks(
    config: FlexiDepthConfig, rows: int, skipped: int, count: int, seed: int = 0
) -> list[Tensor]:
    """`count` masks uint8 [rows, routed layers], 1 = run, each row with exactly `skipped` zeros at random places."""
    generator = torch.Generator().manual_seed(seed)
    routed = config.num_routed_layers
    order = torch.rand(count, rows, routed, generator=generator).argsort(-1)
    return list((order >= skipped).to(torch.uint8))
