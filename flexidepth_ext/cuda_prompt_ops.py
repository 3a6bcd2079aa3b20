"""The CUDA ops between a library's products, checked; `cuda_ops.CudaOps` has them too."""

from __future__ import annotations

import torch
from torch import Tensor

from .cuda_call import Call, ModuleOps
from .errors import DtypeError, ShapeError
from .model_shape import DTYPES


class PromptOps(ModuleOps):
    """What prompts compute on results of 16 bits; csrc/ops has the maths of each."""

    def silu_and_mul(
        self,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
    ) -> Tensor:
        """silu(gate + gate_bias) * (up + up_bias) of matrices [rows, width] of bfloat16 or float16, in their type.

        gate_bias, up_bias: float32 [width].
        """
        with self._call("silu_and_mul", gate) as call:
            y = torch.empty_like(gate)
            if up.dtype != gate.dtype:
                raise DtypeError(
                    f"silu_and_mul: gate has dtype {gate.dtype}, up {up.dtype}; wanted the same"
                )
            self.module.silu_and_mul(
                call.stream,
                _half(call, "gate", gate, list(gate.shape)),
                _half(call, "up", up, list(gate.shape)),
                y.data_ptr(),
                DTYPES[gate.dtype],
                *gate.shape,
                call.vector("gate_bias", gate_bias, gate.shape[1]),
                call.vector("up_bias", up_bias, gate.shape[1]),
            )
        return y

    def residual_add(
        self,
        h: Tensor,
        y: Tensor,
        *,
        bias: Tensor | None = None,
        index: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """h[index] += scale * (y + bias) in place; returns h [.., d], float32.

        Args:
            y: [rows, d] of bfloat16 or float16. bias: float32 [d]. index: int32 [rows], no row twice; None = all of
                them. scale: float32 [rows].
        """
        with self._call("residual_add", h) as call:
            rows = call.rows("h", h, h.shape[-1], index)
            count = h.shape[0] if index is None else index.shape[0]
            self.module.residual_add(
                call.stream,
                _half(call, "y", y, [count, h.shape[1]]),
                DTYPES[y.dtype],
                rows,
                call.vector("bias", bias, h.shape[1]),
                call.vector("scale", scale, count),
            )
        return h


def _half(call: Call, name: str, tensor: Tensor, shape: list[int]) -> int:
    if tensor.dtype not in (torch.bfloat16, torch.float16):
        raise DtypeError(
            f"{call.op}: {name} has dtype {tensor.dtype}; wanted torch.bfloat16 or torch.float16"
        )
    if tensor.dim() != 2 or list(tensor.shape) != shape:
        wanted = shape if len(shape) == 2 else "[rows, width]"
        raise ShapeError(f"{call.op}: {name} is {list(tensor.shape)}; wanted {wanted}")
    return call.address(name, tensor)
