"""The base model with any layer free to be skipped and nothing in its place."""

from __future__ import annotations

import dataclasses

import torch

from ..checkpoints.checkpoint import Checkpoint, TensorStream
from ..config import FlexiDepthConfig
from ..initialization import initial_routing, is_routing


def without_adapters(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of the same base weights that routes every layer, with adapters that give zero.

    A skipped layer leaves the residual stream as it is; its keys and values are still computed. Routers are
    seeded and mean nothing: give the engine a forced routing. With the gate "straight_through" a running layer
    is the base model's, whether decisions come from a list of layers or from a mask.
    """
    config = _plain_config(checkpoint.config)

    def read() -> TensorStream:
        for name, tensor in checkpoint.tensors():
            if not is_routing(name):
                yield name, tensor
        for name, tensor in initial_routing(config, seed=0):
            yield name, torch.zeros_like(tensor) if ".adapter." in name else tensor

    return dataclasses.replace(checkpoint, config=config, routers_trained=False, read_tensors=read)


def _plain_config(config: FlexiDepthConfig) -> FlexiDepthConfig:
    layers = list(range(config.num_hidden_layers))
    routing = {
        "routing_layers": layers,
        # Routers and adapters of width 1: they cost next to nothing.
        "router_reduction_factor": config.hidden_size,
        "adapter_reduction_factor": config.intermediate_size,
        "router_bias": False,
        "gate": "straight_through",
        "router_thresholds": [0.5] * len(layers),
    }
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("calibration", "skip_presets")  # of the routers that are left out
    }
    made: FlexiDepthConfig = FlexiDepthConfig.from_dict({**kept, **routing})
    return made
