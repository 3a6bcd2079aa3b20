"""GGUF as a source of base weights: tensors dequantised one by one to float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from ..config import FlexiDepthConfig
from ..errors import CheckpointError, UnsupportedError
from .checkpoint import Rows, check_names, expected_shapes
from .gguf_header import GgufHeader, TensorInfo

_BYTES_AT_ONCE = (
    4 << 20
)  # of float32: keeps the temporaries of a large embedding small and in cache

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # becomes part of the configuration, not a weight


class GgufWeights:
    """The base weights of a GGUF file. Names and shapes are checked here, before any weight is read.

    Raises:
        CheckpointError: tensors missing, left over, or of other shapes than the metadata say.
    """

    def __init__(self, header: GgufHeader, config: FlexiDepthConfig) -> None:
        self.path = header.path
        self.config = config
        self.tensors = {
            _canonical(name): info for name, info in header.tensors.items() if name != _ROPE_FACTORS
        }
        wanted = expected_shapes(config, routing=False)
        check_names(self.path, wanted, self.tensors)
        for name, shape in wanted.items():
            info = self.tensors[name]
            if info.shape != shape:
                raise CheckpointError(
                    f"{self.path}: tensor {info.name} is {list(info.shape)}; its metadata say {list(shape)}"
                )

    def read(self, names: Iterable[str], rows: Rows | None = None) -> Iterator[Tensor]:
        """float32 tensors of these canonical names, of a name in `rows` these rows alone.

        The file is read piece by piece and never mapped.
        """
        with self.path.open("rb") as file:
            for name in names:
                info, heads = self.tensors[name], self._permuted_heads(name)
                wanted = (rows or {}).get(name)
                if wanted is None:
                    tensor = _read(file, info)
                    yield tensor if heads is None else _unpermute(tensor, heads)
                else:
                    size = None if heads is None else info.shape[0] // heads
                    yield _read_rows(file, info, [_row_in_file(row, size) for row in wanted])

    def _permuted_heads(self, name: str) -> int | None:
        """Heads of a projection whose rows llama.cpp stores in another order; None = in the usual one."""
        if self.config.base_model_type != "llama":
            return None
        if ".self_attn.q_proj." in name:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".self_attn.k_proj." in name else None


def rope_factors(header: GgufHeader) -> Tensor | None:
    """Divisors of the rotary frequencies [head_dim / 2], or None where the file has none."""
    if _ROPE_FACTORS not in header.tensors:
        return None
    with header.path.open("rb") as file:
        return _read(file, header.tensors[_ROPE_FACTORS])


def _canonical(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _IN_LAYER:
        return f"model.layers.{parts[1]}.{_IN_LAYER[parts[2]]}.{parts[3]}"
    return name


def _read(file: BufferedReader, info: TensorInfo) -> Tensor:
    columns = info.shape[-1]
    rows = info.shape[0] if len(info.shape) == 2 else 1
    row_bytes = info.nbytes // rows
    at_once = max(1, min(rows, _BYTES_AT_ONCE // (4 * columns)))
    out = np.empty((rows, columns), dtype=np.float32)
    raw = np.empty((at_once, row_bytes), dtype=np.uint8)
    file.seek(info.offset)
    for start in range(0, rows, at_once):
        piece = raw[: min(at_once, rows - start)]
        _fill(piece, file, info)
        out[start : start + len(piece)] = _dequantized(piece, file, info)
    return torch.from_numpy(out).reshape(info.shape)


def _read_rows(file: BufferedReader, info: TensorInfo, rows: Sequence[int]) -> Tensor:
    """These rows of a matrix, counted as they lie in the file."""
    row_bytes = info.nbytes // info.shape[0]
    raw = np.empty((len(rows), row_bytes), dtype=np.uint8)
    for piece, row in zip(raw, rows, strict=True):
        file.seek(info.offset + row * row_bytes)
        _fill(piece, file, info)
    return torch.from_numpy(_dequantized(raw, file, info))


def _fill(piece: np.ndarray, file: BufferedReader, info: TensorInfo) -> None:
    got = file.readinto(piece.data)
    if got != piece.nbytes:
        raise CheckpointError(
            f"{file.name}: {got} of {piece.nbytes} bytes of {info.name}; the file was cut short"
        )


def _dequantized(raw: np.ndarray, file: BufferedReader, info: TensorInfo) -> np.ndarray:
    try:
        values: np.ndarray = dequantize(raw, info.kind)
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{file.name}: tensor {info.name} is {info.kind.name}, which is not implemented; requantise "
            "the file, to F16 for instance"
        ) from error
    return values


def _unpermute(tensor: Tensor, num_heads: int) -> Tensor:
    """llama.cpp interleaves the two rotary halves of each head's rows; put them one after the other again."""
    halves = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _row_in_file(row: int, head_dim: int | None) -> int:
    """Where llama.cpp put a row; head_dim: of heads whose halves it interleaved, None = it did not."""
    if head_dim is None:
        return row
    half, place = divmod(row % head_dim, head_dim // 2)
    return row - row % head_dim + 2 * place + half
