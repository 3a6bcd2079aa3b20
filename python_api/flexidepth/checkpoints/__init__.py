"""Reading and writing models: Hugging Face directories, GGUF files, routing checkpoints, the default model.

Names are loaded on first use: asking where the default model is kept needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .conversion import convert, merge
    from .default_model import DEFAULT_MODEL, fetch_default_model
    from .routing_saving import save_routing
    from .saving import save_checkpoint
    from .source import open_checkpoint, resolve_model
    from .trainable import load_trainable

_EXPORTS = {
    "DEFAULT_MODEL": "default_model",
    "Checkpoint": "checkpoint",
    "convert": "conversion",
    "fetch_default_model": "default_model",
    "load_trainable": "trainable",
    "merge": "conversion",
    "open_checkpoint": "source",
    "resolve_model": "source",
    "save_checkpoint": "saving",
    "save_routing": "routing_saving",
}

__all__ = [
    "DEFAULT_MODEL",
    "Checkpoint",
    "convert",
    "fetch_default_model",
    "load_trainable",
    "merge",
    "open_checkpoint",
    "resolve_model",
    "save_checkpoint",
    "save_routing",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
