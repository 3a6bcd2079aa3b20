"""What the CUDA ops take and give beside plain tensors; all of it lives on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import DtypeError, UnsupportedError, ValueOutOfRangeError
from .model_shape import DTYPES

if TYPE_CHECKING:
    from .cuda_call import ModuleOps

PAGE_TOKENS = 256
MAX_HEAD_DIM = 128


@dataclass
class Decisions:
    """Which rows run a layer, on the device.

    ran: uint8 [rows]. run_index, skip_index: int32 [rows], of which the first counts[0] and counts[1] are there, in
    ascending order. run_scale, skip_scale: float32 [rows], in the order of the indices. counts: int32 [2].
    gates: float32 [rows].
    """

    gates: Tensor
    ran: Tensor
    run_index: Tensor
    skip_index: Tensor
    run_scale: Tensor
    skip_scale: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device | str) -> Decisions:
        """Room for the decisions on `rows` rows."""

        def room(dtype: torch.dtype, count: int = rows) -> Tensor:
            return torch.empty(count, dtype=dtype, device=device)

        f32, i32 = torch.float32, torch.int32
        return cls(
            room(f32), room(torch.uint8), room(i32), room(i32), room(f32), room(f32), room(i32, 2)
        )


@dataclass(frozen=True)
class RouterWeights:
    """A router behind its first matrix: norm [d_r]; folded [d_r], or dec [d, d_r] and head [d]; all float32."""

    norm: Tensor
    folded: Tensor | None = None
    dec: Tensor | None = None
    head: Tensor | None = None
    bias: float = 0.0
    eps: float = 1e-5
    order: str = "norm_tanh"


class PagedCache:
    """Keys and values of some sequences, in pages of 256 tokens of all layers."""

    def __init__(
        self,
        ops: ModuleOps,
        dtype: torch.dtype,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        num_sequences: int = 1,
        device: torch.device | str = "cuda",
    ) -> None:
        if dtype not in DTYPES:
            raise DtypeError(f"cache: dtype {dtype}; wanted float32, bfloat16 or float16")
        if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
            raise UnsupportedError(
                f"cache: head_dim is {head_dim}; wanted a multiple of 8 up to {MAX_HEAD_DIM}"
            )
        self.dtype, self.num_layers = dtype, num_layers
        self.num_kv_heads, self.head_dim, self.max_length = num_kv_heads, head_dim, max_length
        self.max_pages = -(-max_length // PAGE_TOKENS)
        layer = ops.module.kv_layer_bytes(DTYPES[dtype], num_kv_heads, head_dim)
        self.pages = torch.zeros(
            num_sequences, self.max_pages, num_layers * layer, dtype=torch.uint8, device=device
        )
        addresses = [
            [self.pages[s, p].data_ptr() for p in range(self.max_pages)]
            for s in range(num_sequences)
        ]
        self.page_table = torch.tensor(addresses, dtype=torch.int64, device=device)
        tables = [self.page_table[s].data_ptr() for s in range(num_sequences)]
        self.tables = torch.tensor(tables, dtype=torch.int64, device=device)

    def argument(self, ops: ModuleOps, layer: int) -> Any:
        """Of the compiled ops."""
        if not 0 <= layer < self.num_layers:
            raise ValueOutOfRangeError(f"cache: layer {layer}; there are {self.num_layers}")
        return ops.module.Pages(
            self.tables.data_ptr(), DTYPES[self.dtype], self.num_kv_heads, self.head_dim, layer
        )


def pack_sampling(temperature: float, top_k: int, top_p: float, min_p: float, vocab: int) -> Tensor:
    """A draw's filters as a kernel finds them in device memory: int32 [4], SampleSettings of csrc/ops/sample.h."""
    values = torch.tensor([temperature, top_p, min_p], dtype=torch.float32, device="cpu")
    kept = torch.tensor([min(top_k, vocab)], dtype=torch.int32, device="cpu")
    return torch.cat([values.view(torch.int32), kept])


def sample_room(module: Any, rows: int, device: torch.device | str) -> Tensor:
    """Where the blocks that draw from a row tell each other what they find."""
    return torch.zeros(module.sample_room_bytes(rows), dtype=torch.uint8, device=device)


@dataclass(frozen=True)
class AttentionWorkspace:
    """What attention needs beside its arguments: scratch float32, and counters int32, all 0 before and after."""

    scratch: Tensor
    counters: Tensor
