"""From a checkpoint's tensors to device memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import DtypeError, ShapeError, ValueOutOfRangeError
from .model_shape import DTYPES

if TYPE_CHECKING:
    from .cuda_engine import CudaEngine

_PREFIX = "model.layers."


def load_weights(engine: CudaEngine, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Bring each tensor to the device as it comes, and tell the pass where it is.

    Returns them by name; of a router that is folded the vector is called folded.
    """
    kept: dict[str, Tensor] = {}
    routers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        if tensor.dtype not in DTYPES:
            raise DtypeError(
                f"engine: {name} has dtype {tensor.dtype}; float32, bfloat16 or float16 weights are supported"
            )
        layer, is_router, part = name.partition(".router.")
        if is_router and part in ("dec.weight", "head.weight", "head.bias"):
            routers.setdefault(layer, {})[part] = tensor.detach().float()
            _check_finite(name, tensor)
            continue
        exact = bool(is_router) or tensor.dim() == 1
        kept[name] = _placed(engine, name, tensor, torch.float32 if exact else engine.dtype)
    for number, index in enumerate(engine.config.routing_layers):
        kept |= _router(engine, number, f"{_PREFIX}{index}", routers.pop(f"{_PREFIX}{index}", {}))
    for layer, parts in routers.items():
        raise ValueOutOfRangeError(
            f"weights: unexpected tensor {layer}.router.{next(iter(parts))}; this configuration has no such weight"
        )
    return kept


def _placed(engine: CudaEngine, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    moved = tensor.detach().to(engine.device, dtype).contiguous()
    if not _finite(moved):
        _check_finite(name, tensor)
        raise ValueOutOfRangeError(
            f"weights: {name} has values beyond the largest one of {dtype}; load it as bfloat16"
        )
    if moved.data_ptr() == tensor.data_ptr() or moved.data_ptr() % 16:
        moved = moved.clone()  # not the caller's, who may change it
    columns = moved.shape[1] if moved.dim() == 2 else 1
    engine.native.set_weight(name, moved.data_ptr(), DTYPES[dtype], moved.shape[0], columns)
    return moved


def _router(
    engine: CudaEngine, number: int, layer: str, parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The last two matrices of a router, folded into one vector unless the engine is strict."""
    if ("head.bias" in parts) != bool(engine.config.router_bias):
        raise ValueOutOfRangeError(
            f"weights: {layer}.router.head.bias {'came' if 'head.bias' in parts else 'is missing'}; the checkpoint "
            "does not fit its configuration"
        )
    bias = float(parts["head.bias"]) if "head.bias" in parts else 0.0
    if not {"dec.weight", "head.weight"} <= parts.keys():
        return {}  # finish_loading names what is missing
    dec, head = parts["dec.weight"], parts["head.weight"].reshape(-1)
    wanted = (int(engine.config.hidden_size), int(engine.config.router_dim))
    if tuple(dec.shape) != wanted or head.shape[0] != wanted[0]:
        raise ShapeError(
            f"weights: {layer}.router has dec {list(dec.shape)} and head {list(head.shape)}; wanted {list(wanted)} "
            f"and [{wanted[0]}]"
        )
    engine.router_biases[number] = bias
    if not engine.strict_router:
        folded = (head.double() @ dec.double()).float().to(engine.device)
        engine.native.set_router(number, folded.data_ptr(), bias)
        return {f"{layer}.router.folded": folded}
    names = f"{layer}.router.dec.weight", f"{layer}.router.head.weight"
    kept = {
        name: _placed(engine, name, tensor, torch.float32)
        for name, tensor in zip(names, (dec, head), strict=True)
    }
    engine.native.set_router(number, 0, bias)
    return kept


def _finite(tensor: Tensor) -> bool:
    """Whether every value is; without a mask as large as the tensor, unless its sum overflows."""
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor).all())


def _check_finite(name: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueOutOfRangeError(
            f"weights: {bad} of {tensor.numel()} values of {name} are NaN or infinite; the checkpoint is damaged, load "
            "another copy"
        )
