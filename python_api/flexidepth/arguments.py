"""Numbers among arguments: what counts as one, wherever it comes from. Nothing is rounded or parsed."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from .errors import ValueOutOfRangeError


def as_whole(value: Any) -> int | None:
    """The value as int if it is a whole number of Python, numpy or torch; None for anything else.

    2.0, "2" and True are something else.
    """
    if _is_bool(value) or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_number(value: Any) -> float | None:
    """The value as float if it is a number of Python, numpy or torch; None for anything else."""
    if _is_bool(value) or getattr(value, "ndim", 0) != 0:
        return None
    return float(value) if isinstance(value, (Real, Tensor, np.ndarray)) else None


def whole_number(name: str, value: Any, low: int, high: int | None = None, hint: str = "") -> int:
    """The value as int.

    Args:
        name: how the error names it, with the function it was given to ("generate: top_k").
        low, high: smallest and largest value; high None = no limit.
        hint: what the error adds to the range.

    Raises:
        ValueOutOfRangeError: not a whole number, or out of range.
    """
    number = as_whole(value)
    if number is None or number < low or (high is not None and number > high):
        span = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueOutOfRangeError(f"{name} is {value!r}; wanted a whole number, {span}{hint}")
    return number


def seed_number(name: str, value: Any) -> int:
    """A seed as int: a whole number of 64 bits, with or without a sign."""
    return whole_number(name, value, -(1 << 63), (1 << 64) - 1)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
