"""One call of a CUDA op: its tensors checked and converted to what the compiled module takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .errors import DtypeError, ShapeError
from .model_shape import DTYPES

_ALIGNMENT = 16  # bytes: what one load brings

Weight = Tensor | tuple[Tensor, Tensor | None]  # [n, k], or with its bias [n]


class ModuleOps:
    """Ops of a compiled module, on tensors of one type of device."""

    def __init__(self, module: Any, device_type: str = "cuda") -> None:
        self.module, self.device_type = module, device_type

    @contextmanager
    def _call(self, op: str, first: Tensor) -> Iterator[Call]:
        call = Call(self, op, first.device)
        with call.guard():
            yield call


class Call:
    """Checks the tensors of one call and converts them."""

    def __init__(self, ops: ModuleOps, op: str, device: torch.device) -> None:
        self.module, self.op, self.device = ops.module, op, device
        if device.type != ops.device_type:
            raise DtypeError(
                f"{op}: a tensor is on {device}; wanted {ops.device_type}; move it there"
            )

    def guard(self) -> Any:
        """Makes the tensors' device the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @property
    def stream(self) -> int:
        """The current stream's handle."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def address(self, name: str, tensor: Tensor) -> int:
        if tensor.device != self.device:
            raise DtypeError(
                f"{self.op}: {name} is on {tensor.device}, other tensors are on {self.device}; move it there"
            )
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{self.op}: {name} {list(tensor.shape)} is not contiguous; call .contiguous() first"
            )
        return tensor.data_ptr()

    def rows(
        self,
        name: str,
        tensor: Tensor,
        width: int,
        index: Tensor | None = None,
        live: Tensor | None = None,
    ) -> Any:
        """Rows of a float32 matrix."""
        if tensor.dtype != torch.float32:
            raise DtypeError(f"{self.op}: {name} has dtype {tensor.dtype}; wanted torch.float32")
        if tensor.dim() != 2 or tensor.shape[1] != width:
            raise ShapeError(f"{self.op}: {name} is {list(tensor.shape)}; wanted [rows, {width}]")
        count = tensor.shape[0] if index is None else index.shape[0]
        listed = self.vector(f"{name}'s index", index, count, torch.int32)
        number = self.vector(f"{name}'s live", live, 1, torch.int32)
        return self.module.Rows(self.address(name, tensor), count, width, listed, number)

    def vector(
        self,
        name: str,
        tensor: Tensor | None,
        length: int | None,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Address of a vector; 0 for None."""
        if tensor is None:
            return 0
        if tensor.dtype != dtype:
            raise DtypeError(f"{self.op}: {name} has dtype {tensor.dtype}; wanted {dtype}")
        if tensor.dim() != 1 or length not in (None, tensor.shape[0]):
            wanted = "one dimension" if length is None else f"[{length}]"
            raise ShapeError(f"{self.op}: {name} is {list(tensor.shape)}; wanted {wanted}")
        return self.address(name, tensor)

    def weight(self, name: str, weight: Weight) -> Any:
        """Weights [n, k], with their bias if they come with one."""
        return self.matrix(name, *((weight,) if isinstance(weight, Tensor) else weight))

    def matrix(
        self, name: str, tensor: Tensor, bias: Tensor | None = None, *, float_only: bool = False
    ) -> Any:
        """Weights [n, k]."""
        if tensor.dtype not in DTYPES or (float_only and tensor.dtype != torch.float32):
            wanted = "float32" if float_only else "float32, bfloat16 or float16"
            raise DtypeError(f"{self.op}: {name} has dtype {tensor.dtype}; wanted {wanted}")
        if tensor.dim() != 2:
            raise ShapeError(f"{self.op}: {name} is {list(tensor.shape)}; wanted [n, k]")
        address = self.address(name, tensor)
        if address % _ALIGNMENT:
            raise ShapeError(
                f"{self.op}: {name} begins {address % _ALIGNMENT} bytes behind a multiple of {_ALIGNMENT}; copy it "
                "(.clone()), or slice where rows end"
            )
        biased = self.vector(f"{name}'s bias", bias, tensor.shape[0])
        return self.module.Matrix(address, DTYPES[tensor.dtype], *tensor.shape, biased)
