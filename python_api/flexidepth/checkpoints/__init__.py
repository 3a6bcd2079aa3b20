"""Reading and writing models: Hugging Face directories, GGUF files, the default model."""

from .checkpoint import Checkpoint
from .convert import convert
from .default_model import DEFAULT_MODEL, fetch_default_model
from .saving import save_checkpoint
from .source import open_checkpoint, resolve_model

__all__ = [
    "DEFAULT_MODEL",
    "Checkpoint",
    "convert",
    "fetch_default_model",
    "open_checkpoint",
    "resolve_model",
    "save_checkpoint",
]
