"""Exceptions of the compiled module and its wrappers.

Each class also derives from the built-in exception a caller would expect, so `except ValueError` keeps
working. The C++ code throws one exception type with a kind; the binding maps the kind to these classes.
"""

from __future__ import annotations


class FlexiDepthError(Exception):
    """Base class of every error this project raises on purpose."""


class ShapeError(FlexiDepthError, ValueError):
    """A tensor has the wrong shape, stride or alignment."""


class ValueOutOfRangeError(FlexiDepthError, ValueError):
    """A value (token id, threshold, length, ...) lies outside its allowed range."""


class DtypeError(FlexiDepthError, TypeError):
    """A tensor has the wrong element type or lives on the wrong device."""


class UnsupportedError(FlexiDepthError, NotImplementedError):
    """A combination this build or version does not implement."""


class EngineBusyError(FlexiDepthError, RuntimeError):
    """An engine was called from a second thread while a call was running."""


class EngineClosedError(FlexiDepthError, RuntimeError):
    """An engine or a model was used after close()."""


class OutOfMemoryError(FlexiDepthError, MemoryError):
    """The system refused memory for weights, cache or scratch."""


class InternalError(FlexiDepthError, RuntimeError):
    """A broken invariant inside the compiled module; please report it."""
