"""From the arguments of `FlexiDepth.from_pretrained` to an engine with its weights in place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import whole_number
from .checkpoints.checkpoint import expected_shapes
from .config import FlexiDepthConfig
from .errors import OutOfMemoryError, UnsupportedError, ValueOutOfRangeError
from .generation.skipping import resolve_thresholds
from .metrics import available_memory_bytes

if TYPE_CHECKING:
    from flexidepth_ext.cuda_engine import CudaEngine
    from flexidepth_ext.cuda_runtime import CudaRuntime, Runtime
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
_CUDA_DTYPES = {**_DTYPES, "fp16": torch.float16, "float16": torch.float16}


def load_engine(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    num_threads: int | None,
    strict_router: bool,
    progress: Progress | None,
    runtime: Runtime | None = None,
    max_length: int | None = None,
) -> Engine | CudaEngine:
    """Read the weights of a checkpoint into a new engine; OutOfMemoryError where they cannot fit.

    runtime: of a CUDA device, None = the CPU. max_length: most tokens of a sequence, None = the model's positions.
    """
    if checkpoint.config.ablations:
        raise UnsupportedError(
            f"model: the ablations {', '.join(checkpoint.config.ablations)} are for FlexiDepthForCausalLM "
            "(load_trainable); the engine runs whole FlexiDepth models"
        )
    weights = checkpoint.nbytes_estimate(dtype)
    _check_memory(weights, available_memory_bytes() if runtime is None else runtime.free_bytes())
    tensors = checkpoint.tensors()
    if progress is not None:
        tensors = _with_progress(tensors, checkpoint.config, progress)
    if runtime is not None:
        from flexidepth_ext.cuda_engine import CudaEngine

        return CudaEngine(
            checkpoint.config,
            tensors,
            dtype=dtype,
            max_length=max_length,
            strict_router=strict_router,
            runtime=runtime,
        )
    from flexidepth_ext.engine import Engine

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


def resolve_dtype(dtype: Any, *, cuda: bool = False) -> torch.dtype:
    """The torch dtype of a name or a dtype that the engine takes."""
    names = _CUDA_DTYPES if cuda else _DTYPES
    wanted = names.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) or wanted not in names.values():
        engine = "CUDA" if cuda else "CPU"
        raise UnsupportedError(f"dtype {dtype!r}: the {engine} engine takes {', '.join(names)}")
    return wanted


def resolve_device(device: Any, num_threads: int | None = None) -> CudaRuntime | None:
    """The runtime of a CUDA device; None for the CPU, which "auto" is too.

    Raises:
        UnsupportedError: a CUDA device that this build, this torch or this machine does not have.
        ValueOutOfRangeError: any other device, or threads for a CUDA device.
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueOutOfRangeError(f"device {device!r}: wanted 'auto', 'cpu', 'cuda' or 'cuda:1'")
    if not device.startswith("cuda"):
        return None
    if num_threads is not None:
        raise ValueOutOfRangeError(
            f"model: num_threads is {num_threads}; threads are the CPU's, leave them out with device={device!r}"
        )
    from flexidepth_ext.cuda_runtime import CudaRuntime

    return CudaRuntime(device)


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


def _check_memory(weights: int, available: int | None) -> None:
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
