"""The compiled module and its checked wrappers.

    available(), load_error()   can `_C` be loaded here, and if not, why
    Engine, KVCache, StepResult a whole model on the CPU
    ops                         each operation by itself
    build_info                  a report of what was built and what can run

Importing this package loads neither `_C` nor torch: names are loaded on first use. Where `_C` cannot be
loaded, that use raises an ImportError with the way out; errors and the report keep working.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import (
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

if TYPE_CHECKING:
    from . import ops
    from .engine import Engine, KVCache, StepResult

__all__ = [
    "DtypeError",
    "Engine",
    "EngineBusyError",
    "EngineClosedError",
    "FlexiDepthError",
    "InternalError",
    "KVCache",
    "OutOfMemoryError",
    "ShapeError",
    "StepResult",
    "UnsupportedError",
    "ValueOutOfRangeError",
    "available",
    "load_error",
    "ops",
    "rebuild_command",
]

_FROM_ENGINE = ("Engine", "KVCache", "StepResult")


def available() -> bool:
    """True if the compiled module can be loaded by this interpreter on this machine."""
    return load_error() is None


def load_error() -> Exception | None:
    """The exception that loading the compiled module raises, or None if it loads."""
    try:
        import_module("._C", __name__)
    # A damaged or foreign binary fails in many ways, and the report must survive each of them.
    except Exception as error:
        return error
    return None


def rebuild_command() -> str:
    """The command that builds the compiled module for this interpreter and this way of installing."""
    root = Path(__file__).resolve().parent.parent
    if (root / "CMakeLists.txt").exists():
        return f"{sys.executable} -m pip install --no-deps -e {root}"
    return f"{sys.executable} -m pip install --no-deps --force-reinstall <source folder>"


def _load_compiled() -> Any:
    error = load_error()
    if error is not None:
        raise ImportError(
            f"flexidepth_ext._C cannot be loaded: {error}; a module compiled for Python "
            f"{platform.python_version()} on this machine is wanted; build it with "
            f"`{rebuild_command()}` (`python -m flexidepth_ext` reports the details)"
        ) from error
    return import_module("._C", __name__)


def __getattr__(name: str) -> Any:
    if name == "_C":
        return _load_compiled()
    if name in _FROM_ENGINE:
        return getattr(import_module(".engine", __name__), name)
    if name == "ops":
        return import_module(".ops", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
