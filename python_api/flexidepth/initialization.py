"""Seeded start of routers and adapters for a base model that has none.

Every tensor is a function of its name, its shape and the seed, so that a checkpoint can be converted
tensor by tensor and always comes out the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .config import FlexiDepthConfig, has_adapter


def routing_shapes(config: FlexiDepthConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the router and adapter of one routed layer."""
    d, r, a = config.hidden_size, config.router_dim, config.adapter_dim
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {}
    if "linear_router" not in config.ablations:
        shapes[f"{prefix}router.enc.weight"] = (r, d)
        shapes[f"{prefix}router.norm.weight"] = (r,)
        shapes[f"{prefix}router.dec.weight"] = (d, r)
    shapes[f"{prefix}router.head.weight"] = (1, d)
    if config.router_bias:
        shapes[f"{prefix}router.head.bias"] = (1,)
    if has_adapter(config.ablations):
        shapes[f"{prefix}adapter.gate_proj.weight"] = (a, d)
        shapes[f"{prefix}adapter.up_proj.weight"] = (a, d)
        shapes[f"{prefix}adapter.down_proj.weight"] = (d, a)
    return shapes


def is_routing(name: str) -> bool:
    """Whether a tensor of this name is of a router or an adapter."""
    return ".router." in name or ".adapter." in name


def initial_tensor(
    name: str, shape: tuple[int, ...], config: FlexiDepthConfig, seed: int
) -> Tensor:
    """float32 start of one router or adapter tensor.

    Norm weights are 1, biases 0. Matrices are normal with standard deviation 1 / sqrt(inputs), which keeps
    gates spread around 1/2; the adapter's output is normal with `initializer_range` / 10, so that a skipped
    layer starts close to the identity.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    # One 32-bit number out of both: torch's CPU generator takes no more than the low 32 bits of a seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    std = (
        config.initializer_range / 10
        if name.endswith("adapter.down_proj.weight")
        else shape[-1] ** -0.5
    )
    return torch.randn(shape, generator=generator) * std


def initial_routing(config: FlexiDepthConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, tensor) for every router and adapter, in layer order."""
    for layer in config.routing_layers:
        for name, shape in routing_shapes(config, layer).items():
            yield name, initial_tensor(name, shape, config, seed)
