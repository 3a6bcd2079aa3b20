"""Writing checkpoints so that an old one survives whatever happens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..config import FlexiDepthConfig
from ..errors import SaveError, ValueOutOfRangeError
from .checkpoint import expected_shapes
from .directory_config import TRAINED_KEY
from .names import routing_to_released
from .partial import check_space, partial_directory, swap, sync
from .shards import stored_bytes, write_shards

LAYOUTS = ("flexidepth", "ddllama")


def save_checkpoint(
    config: FlexiDepthConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
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
        tensors: (canonical name, tensor), consumed as a stream, one shard in memory at a time. The head of
            a model with tied embeddings is left out.
        tokenizer: saved beside the weights; None = no tokenizer.
        dtype: type of the stored matrices; None keeps each tensor's own. Routers, norms and biases always
            keep theirs.
        layout: "flexidepth", or "ddllama" (names and config keys of the released checkpoint).
        routers_trained: written to config.json, for `open_checkpoint` to tell.
        overwrite: replace an existing model directory; otherwise a non-empty one is an error.
        max_shard_bytes: largest size of a weight file, unless a single tensor is larger.

    Returns:
        The absolute path written.

    Raises:
        SaveError: no permission, no space, or a target that must not be replaced. CheckpointError: tensors
            missing, unexpected or not finite. ShapeError: a tensor of another shape than `config` says.
            In each case what was there before is untouched and nothing is left behind.
    """
    if max_shard_bytes < 1:
        raise ValueOutOfRangeError(
            f"save: max_shard_bytes is {max_shard_bytes}; at least 1 is wanted"
        )
    content = _config_content(config, layout, dtype, routers_trained)
    target = Path(directory).expanduser().resolve()
    _check_target(target, overwrite)
    needed = stored_bytes(expected_shapes(config), dtype or torch.bfloat16)
    with partial_directory(target, needed) as partial:
        check_space(target, needed)
        write_shards(
            partial, config, tensors, dtype, released=layout == "ddllama", limit=max_shard_bytes
        )
        (partial / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        sync(partial)
        swap(partial, target)
    return target


def _config_content(
    config: FlexiDepthConfig, layout: str, dtype: torch.dtype | None, routers_trained: bool
) -> dict[str, Any]:
    if layout not in LAYOUTS:
        raise ValueOutOfRangeError(f"save: layout is {layout!r}; wanted {' or '.join(LAYOUTS)}")
    # Everything, not the difference from today's defaults, which a later release might change.
    content: dict[str, Any] = config.to_dict()
    content["architectures"] = ["FlexiDepthForCausalLM"]
    if dtype is not None:
        content["dtype"] = str(dtype).removeprefix("torch.")
    if layout == "ddllama":
        content = _released_content(config, content)
    if not routers_trained:
        content[TRAINED_KEY] = False
    return content


def _released_content(config: FlexiDepthConfig, content: dict[str, Any]) -> dict[str, Any]:
    """The configuration in the words of transformers 4, which the released model code needs."""
    from transformers import LlamaConfig

    routing = routing_to_released(config)
    if config.qkv_bias:
        raise ValueOutOfRangeError(
            "save: this model has qkv_bias; the ddllama layout has no place for it"
        )
    known = set(LlamaConfig().to_dict()) | {"initializer_range", "use_cache", "dtype"}
    kept = {
        key: value for key, value in content.items() if key in known and key != "rope_parameters"
    }
    rope = dict(config.rope_parameters)
    kept["rope_theta"] = rope.pop("rope_theta")
    kept["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return {**kept, **routing, "model_type": "ddllama", "architectures": ["DDLlamaForCausalLM"]}


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise SaveError(f"save: {target} is a file; give a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise SaveError(
            f"save: {target} exists and is not empty; choose another directory or allow overwriting"
        )
    if not (target / "config.json").exists():
        # Overwriting replaces the whole directory: never somebody's home or working directory.
        raise SaveError(
            f"save: {target} is not empty and not a model directory (no config.json), so it is not "
            "replaced; choose another directory or remove it yourself"
        )
