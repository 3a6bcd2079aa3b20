"""Exceptions of the package. Each also derives from the built-in class a caller would expect."""

from __future__ import annotations

from flexidepth_ext.errors import (
    DtypeError,
    EngineBusyError,
    EngineClosedError,
    FlexiDepthError,
    InternalError,
    OutOfMemoryError,
    ShapeError,
    UnsupportedError,
    ValueOutOfRangeError,
)

__all__ = [
    "CheckpointError",
    "DataError",
    "DownloadError",
    "DtypeError",
    "EngineBusyError",
    "EngineClosedError",
    "FlexiDepthError",
    "InternalError",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "SaveError",
    "ShapeError",
    "UnsupportedError",
    "ValueOutOfRangeError",
]


class CheckpointError(FlexiDepthError, ValueError):
    """A checkpoint is damaged, incomplete or does not fit its configuration."""


class ModelNotFoundError(CheckpointError):
    """A name is neither a path, nor a known model, nor a hub id that could be reached."""


class DownloadError(FlexiDepthError, RuntimeError):
    """A model could not be fetched."""


class SaveError(FlexiDepthError, OSError):
    """A checkpoint could not be written; what was there before is untouched."""


class DataError(FlexiDepthError, ValueError):
    """Text that cannot be read, has the wrong form or is empty."""
