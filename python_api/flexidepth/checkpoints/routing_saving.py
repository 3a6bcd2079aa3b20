"""Saving routers and adapters alone, so that at any moment the old checkpoint or the new one can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DtypeError, SaveError, ValueOutOfRangeError
from .checkpoint import Rows, all_routing_shapes, check_finite, expected_shapes, some_rows
from .default_model import DEFAULT_MODEL
from .directory import INDEX, SINGLE
from .directory_config import TRAINED_KEY, read_json
from .fingerprint import base_fingerprint, base_signature, tensors_fingerprint
from .partial import check_space, partial_directory, swap, sync, sync_one
from .routing_directory import (
    BASE_MODEL,
    BASE_PRINT,
    BASE_SIGNATURE,
    CONFIG_METADATA,
    ROUTING_FILE,
    ROUTING_PRINT,
)
from .shards import usual_mode

if TYPE_CHECKING:
    from ..modeling import FlexiDepthForCausalLM

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save_routing(
    model: FlexiDepthForCausalLM,
    directory: str | Path,
    *,
    base_model: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    router_dtype: torch.dtype = torch.float32,
    routers_trained: bool = True,
    fingerprint: str | None = None,
) -> Path:
    """Write the routers and adapters of a model; `open_checkpoint` puts them on the base model again.

    A routing checkpoint that is there already is replaced, other files there stay. The tensors' file is
    replaced first and carries the configuration, see routing_directory.py.

    Args:
        base_model: where the base model is found again: "smollm2-135m", a hub id, a directory or a GGUF file, of
            which the absolute path is kept.
        dtype: of the adapters' matrices. router_dtype: of the routers' matrices; gates move with it, so
            calibrate what was stored. Norms and biases are stored in float32.
        routers_trained: written to config.json, for `open_checkpoint` to tell.
        fingerprint: base_fingerprint of the base model; None = of the model's own norms, which are not the stored
            ones where it was loaded in a narrower type.

    Returns:
        The absolute path written.

    Raises:
        SaveError: no permission, no space, or a directory that holds another model. CheckpointError: a tensor
            that is not finite. In each case what was there before is untouched and nothing is left behind.
        ValueOutOfRangeError: a model without routed layers. DtypeError: a dtype that is not stored.
    """
    for name, given in (("dtype", dtype), ("router_dtype", router_dtype)):
        if given not in _DTYPES:
            names = ", ".join(map(str, _DTYPES))
            raise DtypeError(f"save: {name} is {given!r}; wanted one of {names}")
    config = model.config
    shapes = all_routing_shapes(config)
    if not shapes:
        raise ValueOutOfRangeError("save: this model routes no layer; there is nothing to save")
    target = Path(directory).expanduser().resolve()
    _check_target(target)
    state = model.state_dict()
    tensors = {
        name: _stored(name, state[name], router_dtype if ".router." in name else dtype)
        for name in shapes
    }
    content: dict[str, Any] = config.to_dict()
    content["architectures"] = ["FlexiDepthForCausalLM"]
    content[BASE_MODEL] = _lasting(base_model)

    def read(names: Iterable[str], rows: Rows | None = None) -> Iterator[Tensor]:
        return (some_rows(name, state[name], rows) for name in names)

    content[BASE_PRINT] = fingerprint or base_fingerprint(config.num_hidden_layers, read)
    # The model's own, in whatever type: it is compared within more than a narrower type changes.
    content[BASE_SIGNATURE] = base_signature(expected_shapes(config, routing=False), read)
    content[ROUTING_PRINT] = tensors_fingerprint(tensors.items())
    if not routers_trained:
        content[TRAINED_KEY] = False
    needed = sum(tensor.nbytes for tensor in tensors.values())
    exists = target.exists()
    with partial_directory(target, needed, inside=exists) as partial:
        check_space(target, needed)
        _write(partial, tensors, content)
        sync(partial)
        if exists:
            # One after the other in this order, for the reason given above.
            os.replace(partial / ROUTING_FILE, target / ROUTING_FILE)
            os.replace(partial / "config.json", target / "config.json")
            sync_one(target)
        else:
            swap(partial, target)
    return target


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    wide = tensor.dim() == 1
    stored = tensor.detach().to("cpu", torch.float32 if wide else dtype).contiguous()
    check_finite(name, stored)
    return stored


def _write(folder: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    metadata = {
        "format": "pt",
        ROUTING_PRINT: content[ROUTING_PRINT],
        CONFIG_METADATA: json.dumps(content, sort_keys=True),
    }
    path = folder / ROUTING_FILE
    save_file(tensors, path, metadata=metadata)
    path.chmod(usual_mode(folder))
    (folder / "config.json").write_text(text, encoding="utf-8")


def _lasting(base_model: str | Path) -> str:
    """The base model's name in a form that means the same from everywhere."""
    path = Path(base_model).expanduser()
    known = str(base_model) == DEFAULT_MODEL or not path.exists()
    return str(base_model) if known else str(path.resolve())


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise SaveError(f"save: {target} is a file; give a directory")
    config = target / "config.json"
    whole = (target / SINGLE).exists() or (target / INDEX).exists()
    if whole or (config.exists() and BASE_MODEL not in read_json(config)):
        raise SaveError(
            f"save: {target} holds another model, which a routing checkpoint does not replace; choose another directory"
        )
