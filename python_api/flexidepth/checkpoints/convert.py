"""A FlexiDepth checkpoint out of a base model: its weights plus seeded routers and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .default_model import Notify
from .saving import save_checkpoint
from .source import open_checkpoint


def convert(
    base: str | Path,
    out: str | Path,
    *,
    routing: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "flexidepth",
    overwrite: bool = False,
    notify: Notify | None = None,
) -> Path:
    """Write `base` with routers and adapters to the directory `out`.

    Args:
        base: whatever `open_checkpoint` takes; routers it already has are kept.
        routing: routing arguments of FlexiDepthConfig (routing_layers, router_reduction_factor, ...).
        dtype: of the stored matrices; routers are stored in float32.
        layout, overwrite: see `save_checkpoint`.

    Returns:
        The directory written.
    """
    checkpoint = open_checkpoint(base, routing=routing, seed=seed, notify=notify)
    return save_checkpoint(
        checkpoint.config,
        checkpoint.tensors(),
        out,
        tokenizer=checkpoint.tokenizer(),
        dtype=dtype,
        layout=layout,
        routers_trained=checkpoint.routers_trained,
        overwrite=overwrite,
    )
