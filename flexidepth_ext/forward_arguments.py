"""What every engine is given for a pass and for a draw, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .errors import DtypeError, ShapeError, ValueOutOfRangeError

Routing = Literal["router", "forced", "forced_hard", "dense"]

ROUTING: dict[str, int] = {"router": 0, "forced": 1, "forced_hard": 2, "dense": 3}


def check_forward(
    token_ids: Tensor,
    counts: Sequence[int],
    routing: str,
    mask: Tensor | None,
    thresholds: Tensor | None,
    logits_rows: Tensor | None,
    num_routed: int,
) -> Tensor:
    """Check the tensors of `Engine.forward`; returns logits_rows, by default the last row of each sequence."""
    expect(token_ids, torch.int32, 1, "token_ids")
    rows = token_ids.shape[0]
    if mask is not None:
        expect(mask, torch.uint8, 2, "mask")
        if tuple(mask.shape) != (rows, num_routed):
            raise ShapeError(
                f"engine: mask is {list(mask.shape)}; wanted [{rows}, {num_routed}] (rows, routed layers)"
            )
    if thresholds is not None:
        expect(thresholds, torch.float32, 1, "thresholds")
        if thresholds.shape[0] != num_routed:
            raise ShapeError(
                f"engine: {thresholds.shape[0]} thresholds; this model routes {num_routed} layers"
            )
    if routing not in ROUTING:
        raise ValueOutOfRangeError(
            f"engine: routing {routing!r}; wanted one of {', '.join(ROUTING)}"
        )
    if logits_rows is None:
        ends = torch.tensor(counts, dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        logits_rows = ends - 1
    expect(logits_rows, torch.int32, 1, "logits_rows")
    return logits_rows


def check_sampling(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Tensor,
    positions: Tensor,
) -> None:
    """Check the arguments of `Engine.sample`."""
    expect(logits, torch.float32, 2, "logits")
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        expect(tensor, torch.int64, 1, name)
        if tensor.shape[0] != logits.shape[0]:
            raise ShapeError(
                f"engine: {tensor.shape[0]} {name} for {logits.shape[0]} rows of logits"
            )
    check_filters(temperature, top_k, top_p, min_p)


def check_filters(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueOutOfRangeError unless these are settings of a draw."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueOutOfRangeError(f"sample: temperature is {temperature}; it must be 0 or more")
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueOutOfRangeError(
            f"sample: top_k {top_k}, top_p {top_p}, min_p {min_p}; wanted top_k >= 0, 0 < top_p <= 1, "
            "0 <= min_p <= 1"
        )


def expect(tensor: Tensor, dtype: torch.dtype, dim: int, name: str) -> None:
    """Raise DtypeError or ShapeError unless a tensor is a contiguous one in host memory, of that type and dimension."""
    if tensor.dtype != dtype:
        raise DtypeError(f"engine: {name} has dtype {tensor.dtype}; wanted {dtype}")
    if tensor.dim() != dim or not tensor.is_contiguous():
        raise ShapeError(
            f"engine: {name} is {list(tensor.shape)}; wanted a contiguous tensor with {dim} dimensions"
        )
    if tensor.device.type != "cpu":
        raise DtypeError(
            f"engine: {name} lies on {tensor.device}; engines take tensors in host memory, move it: .cpu()"
        )
