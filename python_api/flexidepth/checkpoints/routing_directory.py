"""Routing checkpoints: directories of routers and adapters alone, whose base model is kept elsewhere.

config.json is the whole FlexiDepthConfig with `base_model` (a name, path or hub id), `base_fingerprint` and
`base_signature` (see fingerprint.py; older ones lack the signature, and their base is told by its norms alone) and
`routing_fingerprint`; routing.safetensors has the tensors under their canonical names.

Two files cannot be replaced in one step. So the tensors' file carries the configuration that it was saved with,
and is replaced first: where config.json is of another routing, saving was cut short after that, and the
configuration beside the tensors counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, DownloadError, ModelNotFoundError
from .checkpoint import Checkpoint, Rows, Shapes, all_routing_shapes, expected_shapes, stream
from .directory import (
    INDEX,
    SINGLE,
    SafetensorsWeights,
    directory_tokenizer,
    stored_metadata,
    stored_names,
)
from .directory_config import directory_config, read_json
from .fingerprint import (
    SIGNATURE_TOLERANCE,
    base_fingerprint,
    base_signature,
    signature_distance,
)

ROUTING_FILE = "routing.safetensors"
BASE_MODEL, BASE_PRINT, ROUTING_PRINT = "base_model", "base_fingerprint", "routing_fingerprint"
BASE_SIGNATURE = "base_signature"
CONFIG_METADATA = "config"  # in the tensors' file


def is_routing_directory(path: Path) -> bool:
    """Whether routers and adapters lie there, and no base model."""
    whole = (path / SINGLE).exists() or (path / INDEX).exists()
    return (path / ROUTING_FILE).exists() and not whole


def routing_content(directory: Path) -> dict[str, Any]:
    """The configuration that belongs to the tensors of a routing checkpoint.

    Raises:
        CheckpointError: missing, malformed, or without the keys about the base model.
    """
    path = directory / "config.json"
    metadata = stored_metadata(directory / ROUTING_FILE)
    saved = metadata.get(ROUTING_PRINT)
    content = read_json(path) if path.exists() or saved is None else {}
    if saved is not None and saved != content.get(ROUTING_PRINT):
        path = directory / ROUTING_FILE
        content = _embedded(path, metadata)
    lacking = [key for key in (BASE_MODEL, BASE_PRINT) if not isinstance(content.get(key), str)]
    if lacking:
        raise CheckpointError(
            f"{path}: lacks {', '.join(lacking)}; the configuration beside {ROUTING_FILE} names the base model "
            "that it was trained on; save it with flexidepth.save_routing"
        )
    return content


def open_routing(
    directory: Path,
    routing: dict[str, Any],
    open_base: Callable[[str], Checkpoint],
    base_model: str | None = None,
) -> Checkpoint:
    """A routing checkpoint together with its base model.

    Args:
        routing: routing arguments of FlexiDepthConfig, see `directory_config`.
        open_base: opens a base model by name.
        base_model: where the base lies; None = where the checkpoint says.

    Raises:
        CheckpointError: damaged, or trained on another base model. ModelNotFoundError, DownloadError: the base
            model is not to be had.
    """
    content = routing_content(directory)
    named, print_wanted = content.pop(BASE_MODEL), content.pop(BASE_PRINT)
    signature = content.pop(BASE_SIGNATURE, None)
    content.pop(ROUTING_PRINT, None)
    config, _, trained = directory_config(directory, routing, content)
    base = _open_base(directory, base_model or _place(directory, named), open_base)
    found = base_fingerprint(base.config.num_hidden_layers, base.read_stored)
    if found != print_wanted:
        raise CheckpointError(
            f"{directory}: the routing was trained on another base model: on one with fingerprint {print_wanted}, and "
            f"{base.source} has {found}; give the right one (base_model=..., on the command line --base-model)"
        )
    shapes = expected_shapes(config, routing=False)
    _check_sizes(directory, shapes, base)
    if signature is not None:
        _check_signature(directory, shapes, signature, base)
    path = directory / ROUTING_FILE
    own = all_routing_shapes(config)
    weights = SafetensorsWeights(
        directory, {name: (path, name) for name in stored_names(path)}, own
    )

    def read(names: Iterable[str], rows: Rows | None = None) -> Iterator[Tensor]:
        listed = list(names)
        ours = weights.read([name for name in listed if name in own], rows)
        theirs = base.read_stored([name for name in listed if name not in own], rows)
        for name in listed:
            yield next(ours if name in own else theirs)

    def tokenizer() -> Any | None:
        found = directory_tokenizer(directory)
        return base.tokenizer() if found is None else found

    return Checkpoint(
        config,
        str(directory),
        trained,
        lambda: stream(config, read, routed=True, seed=0),
        tokenizer,
        read,
        base.source,
    )


def _embedded(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        content = json.loads(metadata[CONFIG_METADATA])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: not saved together with the config.json beside it, and without a configuration of its own "
            f"({error!r}); save it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its configuration is no JSON object; save it again")
    return content


def _place(directory: Path, named: str) -> str:
    """A path written by hand that begins with a point is meant from the checkpoint on."""
    return str(directory / named) if named.startswith(".") else named


def _open_base(directory: Path, name: str, open_base: Callable[[str], Checkpoint]) -> Checkpoint:
    try:
        return open_base(name)
    except (ModelNotFoundError, DownloadError) as error:
        raise type(error)(
            f"{directory}: holds routers and adapters alone, and their base model {name!r} is not to be had: {error}\n"
            "Two ways out: say where it lies (base_model=..., on the command line --base-model), or put it there"
        ) from error


def _check_sizes(directory: Path, wanted: Shapes, base: Checkpoint) -> None:
    have = expected_shapes(base.config, routing=False)
    wrong = [name for name in {**wanted, **have} if wanted.get(name) != have.get(name)]
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{directory}: {len(wrong)} tensors of the base model {base.source} do not fit, the first {name}: "
            f"{have.get(name)} there, {wanted.get(name)} in config.json; give the base model that the routing was "
            "trained on, as it was"
        )


def _check_signature(directory: Path, shapes: Shapes, signature: Any, base: Checkpoint) -> None:
    found = base_signature(shapes, base.read_stored)
    try:
        distance, where = signature_distance(shapes, str(signature), found)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}; save it again") from error
    if not distance <= SIGNATURE_TOLERANCE:
        raise CheckpointError(
            f"{directory}: the routing was trained on another base model: {base.source} has the same norms, but other "
            f"weights. Their relative distance in {where} is {distance:.2f}; quantisation may make it "
            f"{SIGNATURE_TOLERANCE}. Give the right one (base_model=..., on the command line --base-model), or train a "
            "routing on this one"
        )
