"""Header of a GGUF file: metadata and where each tensor lies.

The gguf package reads the same, but takes seconds over a vocabulary of 49 thousand entries, which would be
most of the time a model needs to load. Format: GGUF versions 2 and 3, little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf

from ..errors import CheckpointError, UnsupportedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_MAX_DIMS = 4
_READ_AHEAD = 4 << 20  # bytes; a header of 49 thousand tokens and merges takes 2 MB
_LENGTH = struct.Struct("<Q")


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
    """Read and check the header.

    Raises:
        CheckpointError: not a whole GGUF file, with the byte where it breaks. UnsupportedError: another
            version, byte order or a file in several parts.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _parse(_Cursor(file, size, path), path, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(cursor: _Cursor, path: Path, size: int) -> GgufHeader:
    _check_start(cursor, path)
    num_tensors, num_entries = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value()
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedError(
            f"{path}: one of {metadata['split.count']} parts, which is not implemented; join them with "
            "llama-gguf-split --merge"
        )
    raw = []
    for _ in range(num_tensors):
        name, num_dims = cursor.string(), cursor.number("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(
                f"{path}: tensor {name} has {num_dims} dimensions; 1 to {_MAX_DIMS} are possible"
            )
        dims = [cursor.number("Q") for _ in range(num_dims)]
        raw.append((name, dims, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(
            f"{path}: general.alignment is {alignment!r}; a positive number of bytes is wanted"
        )
    start = -(-cursor.at // alignment) * alignment
    tensors = {
        name: _tensor(path, name, dims, kind, start + offset, size)
        for name, dims, kind, offset in raw
    }
    if len(tensors) != len(raw):
        raise CheckpointError(f"{path}: {len(raw) - len(tensors)} tensor names occur twice")
    return GgufHeader(path, metadata, tensors)


def _check_start(cursor: _Cursor, path: Path) -> None:
    magic = cursor.take(4)
    if magic != _MAGIC:
        raise CheckpointError(
            f"{path}: not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}; give a .gguf file or "
            "the directory of a Hugging Face model"
        )
    version = cursor.number("I")
    if version not in _VERSIONS:
        order = " (a big-endian file)" if version & 0xFFFF == 0 else ""
        raise UnsupportedError(
            f"{path}: GGUF version {version}{order}; little-endian versions 2 and 3 are read, convert it anew"
        )


def _tensor(
    path: Path, name: str, dims: list[int], kind: int, offset: int, size: int
) -> TensorInfo:
    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError):
        raise UnsupportedError(
            f"{path}: tensor {name} has type {kind}, which is not known"
        ) from None
    if dims[0] % block:
        raise CheckpointError(
            f"{path}: tensor {name} has rows of {dims[0]} values; {quantization.name} packs {block} at a time"
        )
    nbytes = prod(dims) // block * block_bytes
    if offset + nbytes > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name} ends at byte {offset + nbytes}, the file has {size}; "
            "fetch it again"
        )
    return TensorInfo(name, tuple(reversed(dims)), quantization, offset, nbytes)


class _Cursor:
    """Reads little-endian values one after the other, never past the end of the file."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path = file, size, path
        self.data, self.at = b"", 0

    def need(self, count: int) -> None:
        """Have the next `count` bytes in `data`."""
        end = self.at + count
        if end > self.size:
            raise CheckpointError(
                f"{self.path}: truncated: the header wants {count} bytes at byte {self.at}, the file "
                f"has {self.size}"
            )
        if end > len(self.data):
            self.data += self.file.read(max(end - len(self.data), _READ_AHEAD))

    def take(self, count: int) -> bytes:
        self.need(count)
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        # Inlined reads: a vocabulary and its merges are a hundred thousand of these.
        at = self.at
        if at + 8 > len(self.data):
            self.need(8)
        (count,) = _LENGTH.unpack_from(self.data, at)
        self.at = at + 8
        if self.at + count > len(self.data):
            self.need(count)
        self.at += count
        return self.data[at + 8 : self.at].decode("utf-8", errors="replace")

    def value(self) -> Any:
        """A value behind its type code."""
        kind = self.number("I")
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(
                f"{self.path}: metadata of unknown type {kind} before byte {self.at}"
            )
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        if inner not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: metadata array of unknown type {inner} before byte {self.at}"
            )
        width = struct.calcsize("<" + _SCALARS[inner])
        return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self.take(count * width)))
