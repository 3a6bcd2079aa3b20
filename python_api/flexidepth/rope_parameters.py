"""Rotary-embedding parameters of a configuration, in the one form that the project uses.

That form is transformers 5's `rope_parameters`: {"rope_theta": float, "rope_type": str, ...}. transformers 4
kept `rope_theta` and `rope_scaling` apart, and older files say "type" for "rope_type".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import UnsupportedError, ValueOutOfRangeError

_DEFAULT_THETA = 10000.0
_SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
}


def complete_rope_parameters(
    parameters: Mapping[str, Any] | None,
    theta: float | None = None,
    scaling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Checked `rope_parameters`, from themselves or from transformers 4's rope_theta and rope_scaling.

    Raises:
        UnsupportedError: a scaling that is not implemented, partial rotation, or one set per kind of layer.
        ValueOutOfRangeError: a missing key, or a number outside its range.
    """
    given = dict(parameters or {})
    given = {**({} if theta is None else {"rope_theta": theta}), **dict(scaling or {}), **given}
    if "type" in given:
        given.setdefault("rope_type", given["type"])
        del given["type"]
    if nested := [key for key, value in given.items() if isinstance(value, Mapping)]:
        raise UnsupportedError(
            f"config: rotary embedding per kind of layer ({', '.join(nested)}) is not implemented; "
            "give one for all layers"
        )
    if float(given.pop("partial_rotary_factor", None) or 1.0) != 1.0:
        raise UnsupportedError("config: partial rotary embedding is not implemented")
    given = {"rope_theta": _DEFAULT_THETA, "rope_type": "default", **given}
    kind = given["rope_type"]
    if kind not in _SCALING_KEYS:
        raise UnsupportedError(
            f"config: rope type {kind!r} is not implemented; {', '.join(_SCALING_KEYS)} are"
        )
    if missing := [key for key in _SCALING_KEYS[kind] if key not in given]:
        raise ValueOutOfRangeError(f"config: rope type {kind!r} lacks {', '.join(missing)}")
    for key in ("rope_theta", *_SCALING_KEYS[kind]):
        value = given[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueOutOfRangeError(f"config: rope {key} is {value!r}; wanted a number above 0")
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise ValueOutOfRangeError(
            f"config: rope high_freq_factor is {given['high_freq_factor']}; wanted more than "
            f"low_freq_factor, which is {given['low_freq_factor']}"
        )
    return given


def rope_parameters_of(base: Any) -> dict[str, Any]:
    """The parameters of a transformers configuration, of version 4.57 or 5."""
    parameters = getattr(base, "rope_parameters", None)
    if parameters:
        return complete_rope_parameters(parameters)
    return complete_rope_parameters(
        None, getattr(base, "rope_theta", None), getattr(base, "rope_scaling", None)
    )
