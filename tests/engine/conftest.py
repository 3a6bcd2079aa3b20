"""Tiny models made on the spot, as reference and as engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flexidepth.config import FlexiDepthConfig
from flexidepth.initialization import initial_routing
from flexidepth.modeling import FlexiDepthForCausalLM
from flexidepth_ext.engine import Engine

VOCAB = 211


def tiny_config(**changes: Any) -> FlexiDepthConfig:
    """Four layers, the last three routed; two of three heads share keys."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "routing_layers": [1, 2, 3],
        "router_reduction_factor": 4,
        "adapter_reduction_factor": 4,
        "tie_word_embeddings": True,
    }
    return FlexiDepthConfig(**{**values, **changes})


def tiny_model(config: FlexiDepthConfig, seed: int = 0) -> FlexiDepthForCausalLM:
    """Random weights, large enough that layers matter and gates spread over (0, 1)."""
    torch.manual_seed(seed)
    model = FlexiDepthForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
        for name, tensor in initial_routing(config, seed):
            if ".router." in name:
                model.get_parameter(name).copy_(
                    tensor * (1.5 if name.endswith("head.weight") else 1.0)
                )
    model.tie_weights()
    return model


def weights_of(model: FlexiDepthForCausalLM) -> list[tuple[str, torch.Tensor]]:
    tied = model.config.tie_word_embeddings
    return [(n, t) for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")]


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(
        model: FlexiDepthForCausalLM, dtype: torch.dtype = torch.float32, **arguments: Any
    ) -> Engine:
        arguments.setdefault("max_rows", 512)  # whole test texts in one pass
        made.append(Engine(model.config, weights_of(model), dtype=dtype, **arguments))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(
        0, VOCAB, (300,), dtype=torch.int32, generator=torch.Generator().manual_seed(7)
    )
