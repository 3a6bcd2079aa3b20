"""The weight files of a checkpoint: safetensors, one file or several with an index."""

from __future__ import annotations

import json
import stat
import uuid
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import CheckpointError, ShapeError
from .checkpoint import Shapes, check_finite, check_names, expected_shapes
from .directory import INDEX, SINGLE
from .names import to_released


def stored_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """Fewest bytes of weights of these shapes: matrices in `dtype`, the rest no narrower than 2 bytes."""
    size = torch.empty((), dtype=dtype).element_size()
    return sum(
        prod(shape) * (size if _narrows(name, len(shape)) else 2) for name, shape in shapes.items()
    )


def write_shards(
    folder: Path,
    config: FlexiDepthConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    *,
    released: bool,
    limit: int,
) -> None:
    """Write a stream of (canonical name, tensor) to `folder`, `limit` bytes a file, one file in memory.

    Args:
        dtype: type of the matrices outside routers; None keeps each tensor's own.
        released: name the tensors as the released checkpoint does.

    Raises:
        CheckpointError: tensors missing, unexpected, repeated or not finite. ShapeError: of another shape.
    """
    wanted = expected_shapes(config)
    seen: dict[str, int] = {}  # name -> shard
    pending: dict[str, Tensor] = {}
    size = total = shard = 0
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # the embedding, which is stored already
        stored = _checked(name, tensor, wanted, seen, dtype)
        if pending and size + stored.nbytes > limit:
            _write(folder / _shard(shard), pending)
            shard, pending, size = shard + 1, {}, 0
        seen[name] = shard
        pending[to_released(name) if released else name] = stored
        size += stored.nbytes
        total += stored.nbytes
    check_names("save", wanted, seen)
    _write(folder / _shard(shard), pending)
    if shard == 0:
        (folder / _shard(0)).rename(folder / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{shard + 1:05d}.safetensors" for i in range(shard + 1)]
    for i, file in enumerate(names):
        (folder / _shard(i)).rename(folder / file)
    weight_map = {to_released(name) if released else name: names[i] for name, i in seen.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _checked(
    name: str, tensor: Tensor, wanted: Shapes, seen: dict[str, int], dtype: torch.dtype | None
) -> Tensor:
    """`tensor` as it is stored: detached, contiguous, not sharing memory with others."""
    if name in seen:
        raise CheckpointError(f"save: tensor {name} came twice")
    if name in wanted and tuple(tensor.shape) != wanted[name]:
        raise ShapeError(
            f"save: tensor {name} is {list(tensor.shape)}; config says {list(wanted[name])}"
        )
    narrow = dtype is not None and _narrows(name, tensor.dim())
    stored = tensor.detach().to("cpu", dtype if narrow else tensor.dtype).contiguous()
    check_finite(name, stored)
    # save_file refuses two names for the same memory, which layers sharing a weight have.
    return stored.clone() if stored.data_ptr() == tensor.data_ptr() else stored


def _narrows(name: str, dims: int) -> bool:
    """Whether a tensor is stored in the narrow type: a matrix outside the router."""
    return dims == 2 and ".router." not in name


def _shard(number: int) -> str:
    return f"shard-{number}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(usual_mode(path.parent))


def usual_mode(folder: Path) -> int:
    """The mode of a file that is created in `folder` in the usual way, as umask and folder want it.

    safetensors makes its files readable by their owner alone.
    """
    # Asked of a file: os.umask tells the mask only by changing it, for every thread.
    probe = folder / f".{uuid.uuid4().hex}.probe"
    probe.touch()
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
