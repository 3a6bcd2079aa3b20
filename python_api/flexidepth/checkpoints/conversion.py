"""A FlexiDepth checkpoint out of a base model: its weights plus seeded routers and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import DtypeError
from .default_model import Notify
from .saving import save_checkpoint
from .source import open_checkpoint

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "f16": torch.float16,
    "float16": torch.float16,
    "f32": torch.float32,
    "float32": torch.float32,
}


def convert(
    base: str | Path,
    out: str | Path,
    *,
    routing: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype | str = torch.bfloat16,
    layout: str = "flexidepth",
    overwrite: bool = False,
    prefer_hub: bool = False,
    notify: Notify | None = None,
) -> Path:
    """Write `base` with routers and adapters to the directory `out`.

    Args:
        base, prefer_hub, notify: see `open_checkpoint`; routers the source already has are kept.
        routing: routing arguments of FlexiDepthConfig (routing_layers, router_reduction_factor, ...).
        seed: of the routers and adapters, where the source has none.
        dtype: of the stored matrices, a torch.dtype or "bf16", "f16", "f32"; routers are stored in float32.
        layout, overwrite: see `save_checkpoint`.

    Returns:
        The absolute path written.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise DtypeError(f"convert: dtype is {dtype!r}; wanted one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[dtype]
    checkpoint = open_checkpoint(
        base, routing=routing, seed=seed, prefer_hub=prefer_hub, notify=notify
    )
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
