"""Reading and writing models: Hugging Face directories, GGUF files, the default model.

Names are loaded on first use: asking where the default model is kept needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .conversion import convert
    from .default_model import DEFAULT_MODEL, fetch_default_model
    from .saving import save_checkpoint
    from .source import open_checkpoint, resolve_model

_EXPORTS = {
    "DEFAULT_MODEL": "default_model",
    "Checkpoint": "checkpoint",
    "convert": "conversion",
    "fetch_default_model": "default_model",
    "open_checkpoint": "source",
    "resolve_model": "source",
    "save_checkpoint": "saving",
}

__all__ = [
    "DEFAULT_MODEL",
    "Checkpoint",
    "convert",
    "fetch_default_model",
    "open_checkpoint",
    "resolve_model",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
