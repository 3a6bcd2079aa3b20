"""From the arguments of `FlexiDepth.from_pretrained` to an engine with its weights in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexidepth_ext import rebuild_command

from .arguments import whole_number
from .checkpoints.checkpoint import expected_shapes
from .config import FlexiDepthConfig
from .errors import OutOfMemoryError, UnsupportedError, ValueOutOfRangeError
from .generation.skipping import resolve_thresholds
from .metrics import available_memory_bytes

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine

    from .checkpoints import Checkpoint

Progress = Callable[[int, int], None]

_DTYPES = {
    "auto": torch.bfloat16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


def load_engine(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    num_threads: int | None,
    strict_router: bool,
    progress: Progress | None,
) -> Engine:
    """Read the weights of a checkpoint into a new engine; OutOfMemoryError where they cannot fit."""
    from flexidepth_ext.engine import Engine

    if checkpoint.config.ablations:
        raise UnsupportedError(
            f"model: the ablations {', '.join(checkpoint.config.ablations)} are for FlexiDepthForCausalLM "
            "(load_trainable); the engine runs whole FlexiDepth models"
        )
    _check_memory(checkpoint.nbytes_estimate(dtype))
    tensors = checkpoint.tensors()
    if progress is not None:
        tensors = _with_progress(tensors, checkpoint.config, progress)
    return Engine(
        checkpoint.config,
        tensors,
        dtype=dtype,
        num_threads=num_threads,
        strict_router=strict_router,
    )


def with_skip_level(
    checkpoint: Checkpoint, routing: dict[str, Any] | None, skip: Any, target_layers_skipped: Any
) -> Checkpoint:
    """`checkpoint` with the thresholds of a preset or of a number of layers skipped, if one was asked for."""
    # Given thresholds are in the configuration already; here they only stand in the way of another wish.
    given = (routing or {}).get("router_thresholds")
    if skip is None and target_layers_skipped is None:
        return checkpoint
    config = checkpoint.config
    thresholds = resolve_thresholds(config, given, skip, target_layers_skipped)
    changed = FlexiDepthConfig.from_dict({**config.to_dict(), "router_thresholds": thresholds})
    return replace(checkpoint, config=changed)


def resolve_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a name or a dtype that the CPU engine takes."""
    wanted = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted not in (torch.bfloat16, torch.float32):
        raise UnsupportedError(f"dtype {dtype!r}: the CPU engine takes {', '.join(_DTYPES)}")
    return wanted


def check_device(device: Any) -> None:
    """Raise unless there is an engine for this device."""
    kind = device.split(":")[0] if isinstance(device, str) else device
    if kind == "cuda":
        raise UnsupportedError(
            "device 'cuda': this version has no CUDA engine yet, however it is built; use device='cpu' (in a "
            f"version that has one, `FLEXIDEPTH_CUDA=ON {rebuild_command()}` builds it)"
        )
    if kind not in ("auto", "cpu"):
        raise ValueOutOfRangeError(f"device {device!r}: wanted 'auto' or 'cpu'")


def resolve_max_length(max_length: Any, config: FlexiDepthConfig) -> int:
    """Most tokens of prompt and answer; None = all positions of the model."""
    if max_length is None:
        return config.max_position_embeddings
    return whole_number(
        "model: max_length",
        max_length,
        1,
        config.max_position_embeddings,
        ", the model's positions",
    )


def _check_memory(weights: int) -> None:
    available = available_memory_bytes()
    if available is not None and weights > available:
        raise OutOfMemoryError(
            f"model: its weights need {weights / 1e9:.2f} GB, {available / 1e9:.2f} GB of memory are available; close "
            "other programs or use dtype='bfloat16'"
        )


def _with_progress(
    tensors: Iterator[tuple[str, Tensor]], config: FlexiDepthConfig, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    total = len(expected_shapes(config))
    for done, item in enumerate(tensors, start=1):
        yield item
        progress(done, total)
