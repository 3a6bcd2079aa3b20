"""Masks that users give: from arrays, tensors and lists of lists to one checked tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import DtypeError, ShapeError, ValueOutOfRangeError

# Kinds of numpy types that torch can hold: bool, signed, unsigned, floating.
_HELD = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}


def recorded_mask(mask: Any, num_routed: int) -> Tensor:
    """A checked mask as uint8 [tokens, num_routed] on the CPU, a copy: 1 = run.

    Args:
        mask: a torch tensor, a numpy array or a list of rows; booleans, or integers 0 and 1.
        num_routed: routed layers of the model.

    Raises:
        ShapeError: not two-dimensional, ragged rows, another number of layers.
        ValueOutOfRangeError: a value other than 0 and 1.
        DtypeError: neither booleans nor integers, even where all values are 0.0 and 1.0: gates are no mask.
    """
    shape, dtype, tensor = _tensor_of(mask)
    if len(shape) != 2 or shape[1] != num_routed:
        hint = "; layers to run go in a plain list of numbers" if len(shape) == 1 else ""
        raise ShapeError(
            f"force_routing: mask is {shape}; wanted [tokens, {num_routed}] (routed layers){hint}"
        )
    if tensor is None:
        raise DtypeError(
            f"force_routing: mask is of type {dtype} and begins with {_first(mask)}; wanted booleans, or "
            "integers 0 and 1"
        )
    other = tensor[(tensor != 0) & (tensor != 1)]
    if len(other):
        raise ValueOutOfRangeError(
            f"force_routing: mask holds {other[0].item()}; wanted True and False (compare gates with their "
            "thresholds first)"
        )
    if tensor.is_floating_point() or tensor.is_complex():
        raise DtypeError(
            f"force_routing: mask is of type {dtype}; wanted booleans, or integers 0 and 1; convert it with "
            "mask.bool() (numpy: mask.astype(bool))"
        )
    # bool first: a copy even of uint8, which the caller may change later.
    return tensor.bool().to(torch.uint8).contiguous()


def _tensor_of(mask: Any) -> tuple[list[int], str, Tensor | None]:
    """(shape, name of the type, the values; None where torch has no such type)."""
    if isinstance(mask, Tensor):
        return list(mask.shape), str(mask.dtype), mask.detach().cpu()
    array = _array_of(mask)
    held = _HELD.get(array.dtype.kind)
    values = None if held is None else torch.from_numpy(array.astype(held))
    return list(array.shape), str(array.dtype), values


def _array_of(mask: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(mask)
    except ValueError:  # rows of several lengths
        widths = [len(row) if hasattr(row, "__len__") else repr(row) for row in mask]
        raise ShapeError(
            f"force_routing: the mask's rows have lengths {widths}; wanted one value per routed layer in each"
        ) from None


def _first(mask: Any) -> str:
    return ", ".join(map(repr, np.asarray(mask).ravel()[:1].tolist())) or "nothing"
