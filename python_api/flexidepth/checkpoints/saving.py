"""Writing checkpoints so that an old one survives whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import SaveError, ValueOutOfRangeError
from .names import routing_to_released, to_released

LAYOUTS = ("flexidepth", "ddllama")
_UNTRAINED = "flexidepth_untrained"


def save_checkpoint(
    config: FlexiDepthConfig,
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | Path,
    *,
    tokenizer: Any | None = None,
    dtype: torch.dtype | None = None,
    layout: str = "flexidepth",
    routers_trained: bool = True,
    overwrite: bool = False,
    max_shard_bytes: int = 2 << 30,
) -> Path:
    """Write a checkpoint next to `directory`, then move it in place in one step.

    Args:
        tensors: (canonical name, tensor), consumed as a stream, one shard in memory at a time.
        dtype: type of the stored matrices; None keeps each tensor's own. Routers stay float32.
        layout: "flexidepth", or "ddllama" (names and config keys of the released checkpoint).
        overwrite: replace an existing, non-empty directory; otherwise it is an error.

    Raises:
        SaveError: no permission, no space, or a non-empty target. What was there is untouched.
    """
    if layout not in LAYOUTS:
        raise ValueOutOfRangeError(f"save: layout is {layout!r}; wanted {' or '.join(LAYOUTS)}")
    target = Path(directory).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise SaveError(f"save: {target} exists and is not empty; choose another directory or allow overwriting")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise SaveError(f"save: cannot write in {target.parent}: {error.strerror}; choose a directory you may write to") from error
    try:
        _write_weights(partial, tensors, dtype, layout, max_shard_bytes)
        _write_config(partial, config, layout)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if not routers_trained:
            (partial / _UNTRAINED).write_text("Routers and adapters are seeded, not trained.\n")
        os.chmod(partial, 0o755)
        _swap(partial, target)
    except Exception as error:
        # Any failure, also safetensors' own error for a full disk, leaves the old checkpoint alone.
        if isinstance(error, OSError) or "os error" in str(error).lower() or "no space" in str(error).lower():
            free = shutil.disk_usage(target.parent).free
            raise SaveError(f"save: writing {target} failed: {error}; {free} bytes are free there") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, layout: str, limit: int
) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        if pending:
            save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
            pending, size = {}, 0

    for name, tensor in tensors:
        narrow = dtype is not None and tensor.dim() == 2 and ".router." not in name
        stored = tensor.detach().to(dtype if narrow else tensor.dtype).contiguous()
        stored = stored.clone() if stored.data_ptr() == tensor.data_ptr() else stored
        if size + stored.nbytes > limit:
            flush()
        pending[to_released(name) if layout == "ddllama" else name] = stored
        size += stored.nbytes
        total += stored.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
    else:
        weight_map = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"shard-{i}.safetensors").rename(folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for file_path in folder.glob("*.safetensors"):
        with file_path.open("rb") as file:
            os.fsync(file.fileno())


def _write_config(folder: Path, config: FlexiDepthConfig, layout: str) -> None:
    if layout == "flexidepth":
        stored = type(config).from_dict(config.to_dict())
        stored.architectures = ["FlexiDepthForCausalLM"]
        stored.save_pretrained(folder)
        return
    if config.base_model_type != "llama" or config.gate != "multiplier" or config.router_order != "norm_tanh":
        raise ValueOutOfRangeError(
            "save: the ddllama layout holds Llama models with multiplier gates and order norm_tanh; this one has "
            f"base {config.base_model_type}, gate {config.gate}, order {config.router_order}"
        )
    content = {k: v for k, v in config.to_dict().items() if not k.startswith(("router_", "adapter_", "routing_"))}
    content |= routing_to_released(config) | {"architectures": ["DDLlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True))


def _swap(partial: Path, target: Path) -> None:
    """Move `partial` to `target`; an old directory steps aside first and comes back if that fails."""
    if not target.exists():
        os.rename(partial, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
