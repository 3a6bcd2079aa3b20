"""Header of a GGUF file: metadata and where each tensor lies.

The gguf package reads the same, but takes two seconds over a vocabulary of 49 thousand entries, which is
most of the time a model needs to load; this reader takes a twentieth. Format: GGUF version 2 and 3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from ..errors import CheckpointError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_HEADER = 1 << 28  # bytes; a vocabulary of a million entries takes a tenth


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. shape is row-major, as torch has it; offset and nbytes are in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header; CheckpointError for anything that is not a whole GGUF file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        cursor = _Cursor(file.read(min(size, _MAX_HEADER)), path)
    if cursor.take(4) != _MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
    version = cursor.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version}; versions 2 and 3 are supported")
    num_tensors, num_entries = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    raw = []
    for _ in range(num_tensors):
        name = cursor.string()
        dims = [cursor.number("Q") for _ in range(cursor.number("I"))]
        raw.append((name, dims, cursor.number("I"), cursor.number("Q")))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _tensor(path, name, dims, kind, start + offset, size) for name, dims, kind, offset in raw}
    return GgufHeader(path, metadata, tensors)


def _tensor(path: Path, name: str, dims: list[int], kind: int, offset: int, size: int) -> TensorInfo:
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError):
        raise CheckpointError(f"{path}: tensor {name} has unknown type {kind}") from None
    count = 1
    for dim in dims:
        count *= dim
    nbytes = count // block * block_bytes
    if offset + nbytes > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name} ends at byte {offset + nbytes}, the file has {size}; fetch it again"
        )
    return TensorInfo(name, tuple(reversed(dims)), quantization, offset, nbytes)


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise CheckpointError(
                f"{self.path}: truncated: the header wants {count} bytes at {self.at}, the file has {len(self.data)}"
            )
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                code = _SCALARS[inner]
                return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: metadata of unknown type {kind} at byte {self.at}")
        return self.number(_SCALARS[kind])
