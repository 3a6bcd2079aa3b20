"""Hugging Face directories: a base model, a FlexiDepth checkpoint, or the released `ddllama` layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import base_shapes, expected_shapes
from .names import from_released, routing_from_released

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F32", "BF16", "F16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError when it is missing or malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a model directory has a {path.name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is wanted, not a {type(content).__name__}")
    return content


def directory_config(directory: Path, routing: dict[str, Any]) -> tuple[FlexiDepthConfig, bool]:
    """(configuration, whether the directory holds routers and adapters)."""
    from transformers import AutoConfig, LlamaConfig

    content = read_json(directory / "config.json")
    kind = content.get("model_type")
    if kind == "flexidepth":
        return FlexiDepthConfig.from_dict({**content, **routing}), True
    if kind == "ddllama":
        base = LlamaConfig.from_dict({k: v for k, v in content.items() if k != "model_type"})
        return FlexiDepthConfig.from_base(base, **{**routing_from_released(content), **routing}), True
    if kind is None:
        raise CheckpointError(f"{directory / 'config.json'}: no model_type")
    try:
        base = AutoConfig.from_pretrained(directory)
    except ValueError as error:
        raise UnsupportedError(f"{directory}: model_type {kind!r}: {error}") from error
    return FlexiDepthConfig.from_base(base, **routing), False


def directory_tensors(directory: Path, config: FlexiDepthConfig, routed: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors in layer order, memory-mapped. Names, shapes and types are checked before the first is read."""
    files = _tensor_files(directory)
    wanted = expected_shapes(config) if routed else base_shapes(config)
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)
    files = {n: f for n, f in files.items() if not n.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(wanted.keys() - files.keys()), sorted(files.keys() - wanted.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors missing ({_short(missing)}), {len(unexpected)} unexpected "
            f"({_short(unexpected)}); config.json and the weights do not belong together"
        )
    handles = {path: _open(path) for path in {path for path, _ in files.values()}}
    for name, shape in wanted.items():
        path, stored = files[name]
        piece = handles[path].get_slice(stored)
        if tuple(piece.get_shape()) != shape or piece.get_dtype() not in _DTYPES:
            raise CheckpointError(
                f"{path}: {stored} is {piece.get_dtype()} {piece.get_shape()}; wanted {' or '.join(_DTYPES)} {list(shape)}"
            )
    for name in wanted:
        path, stored = files[name]
        yield name, handles[path].get_tensor(stored)


def _tensor_files(directory: Path) -> dict[str, tuple[Path, str]]:
    """Canonical name -> (file, stored name)."""
    if (directory / _INDEX).exists():
        index = read_json(directory / _INDEX).get("weight_map", {})
        return {from_released(name): (directory / file, name) for name, file in index.items()}
    single = directory / _SINGLE
    if not single.exists():
        if list(directory.glob("pytorch_model*.bin")):
            raise UnsupportedError(
                f"{directory}: weights are pickled (pytorch_model.bin), which is not read; save the model as "
                "safetensors (model.save_pretrained) first"
            )
        raise CheckpointError(f"{directory}: neither {_SINGLE} nor {_INDEX}; no weights to load")
    return {from_released(name): (single, name) for name in _open(single).keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing, though the index lists it; fetch the checkpoint again") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or truncated ({error}); fetch it again") from error


def _short(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "none"
