"""A whole FlexiDepth checkpoint: out of a base model and seeded routers, or out of a routing checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, DtypeError
from .checkpoint import Checkpoint
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
    seed: int | None = None,
    base_model: str | Path | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    layout: str = "flexidepth",
    overwrite: bool = False,
    prefer_hub: bool = False,
    notify: Notify | None = None,
) -> Path:
    """Write `base` with routers and adapters to the directory `out`.

    Args:
        base, base_model, prefer_hub, notify: see `open_checkpoint`; routers the source already has are kept.
        routing: routing arguments of FlexiDepthConfig (routing_layers, router_reduction_factor, ...).
        seed: of the routers and adapters, where the source has none; see `open_checkpoint`.
        dtype: of the stored matrices, a torch.dtype or "bf16", "f16", "f32"; routers are stored in float32.
        layout, overwrite: see `save_checkpoint`.

    Returns:
        The absolute path written.
    """
    stored = _torch_dtype("convert", dtype)
    checkpoint = open_checkpoint(
        base,
        routing=routing,
        seed=seed,
        base_model=base_model,
        prefer_hub=prefer_hub,
        notify=notify,
    )
    return _write(checkpoint, out, stored, layout, overwrite)


def merge(
    routing_directory: str | Path,
    out: str | Path,
    *,
    base_model: str | Path | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    overwrite: bool = False,
    prefer_hub: bool = False,
    notify: Notify | None = None,
) -> Path:
    """Write a routing checkpoint and its base model to the directory `out`, as one model that needs no other.

    Args:
        routing_directory: as `save_routing` writes it.
        base_model: where the base model lies; None = where the checkpoint says.
        dtype, overwrite, prefer_hub, notify: see `convert`.

    Returns:
        The absolute path written.

    Raises:
        CheckpointError: no routing checkpoint, a damaged one, or one of another base model.
    """
    stored = _torch_dtype("merge", dtype)
    checkpoint = open_checkpoint(
        routing_directory, base_model=base_model, prefer_hub=prefer_hub, notify=notify
    )
    if checkpoint.base is None:
        raise CheckpointError(
            f"merge: {routing_directory} is no routing checkpoint: it has its base weights already; `flexidepth "
            "convert` writes it anew"
        )
    return _write(checkpoint, out, stored, "flexidepth", overwrite)


def _torch_dtype(command: str, dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise DtypeError(f"{command}: dtype is {dtype!r}; wanted one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _write(
    checkpoint: Checkpoint, out: str | Path, dtype: torch.dtype, layout: str, overwrite: bool
) -> Path:
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
