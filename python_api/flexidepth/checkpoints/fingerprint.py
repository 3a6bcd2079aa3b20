"""Which base model a routing was trained on, told by a hash of its norms and a sample of its other weights.

The norms are compared exactly, since every storage type keeps them; the sample within what quantisation changes.
Together they tell a model of other weights, a freshly initialised one too, and one of which a layer or a kind of
projection was replaced. They can not tell a base whose norms were kept and whose other weights differ by less than
quantisation may change them, as after a light fine-tune or with a LoRA merged; nor, more often than not, one of which
a few rows or one projection of one layer are others.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import ReadTensors, Shapes

# Relative distance up to which two signatures are the same model's. Of SmolLM2-135M in Q4_1 and in another type,
# made by ggml of Q4_1 with noise of its step, it is at most 0.13 for types of 5 to 16 bits, 0.20 for those of 4, 0.27
# for 3, 0.42 for Q2_K, and 0.99 for ternary TQ2_0, which is refused. Unrelated weights of the same size are 1.5 apart,
# much smaller or larger ones 1.0.
SIGNATURE_TOLERANCE = 0.5
_ROWS_IN_LAYERS, _ROWS_ELSEWHERE = 1, 16  # of a projection; of an embedding or a head
_VALUES = 7  # of a row
_PLACES = struct.Struct("<8I")  # a sha256: where the row lies, and the values in it


def base_fingerprint(num_layers: int, read: ReadTensors) -> str:
    """sha256 in hex over the norms' weights as little-endian float32, layer by layer.

    Of each layer input_layernorm and post_attention_layernorm, then model.norm. Norms, because every storage
    type keeps them exactly: a quantised copy of a base model is the same base model.

    Args:
        num_layers: layers of the base model.
        read: gives its tensors.
    """
    names = [
        f"model.layers.{layer}.{norm}.weight"
        for layer in range(num_layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    digest = hashlib.sha256()
    for tensor in read([*names, "model.norm.weight"]):
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def base_signature(shapes: Shapes, read: ReadTensors) -> str:
    """A sample of the base model's matrices: float16, little-endian, in base64; some 5 KB for 32 layers.

    Of each projection of each layer 7 values of one row, of embeddings and of an untied head 7 of each of 16 rows,
    at places that the tensor's name and shape decide.

    Args:
        shapes: of the base model's tensors in layer order; matrices are sampled.
        read: gives rows of its tensors.
    """
    places = {name: _places(name, shape) for name, shape in shapes.items() if len(shape) == 2}
    rows = {name: [row for row, _ in found] for name, found in places.items()}
    sample = [
        np.take_along_axis(_numpy(tensor), np.array([columns for _, columns in found]), 1).ravel()
        for found, tensor in zip(places.values(), read(rows, rows), strict=True)
    ]
    return base64.b64encode(np.concatenate(sample).astype("<f2").tobytes()).decode()


def signature_distance(shapes: Shapes, one: str, other: str) -> tuple[float, str]:
    """(relative distance of two signatures, where they are that far apart).

    The largest over layers, kinds of projection, embedding and head of |a - b| / max(|a|, |b|): 0 for the same
    weights, about 1.4 for unrelated ones of the same size, 1 where one of them is 0.

    Raises:
        CheckpointError: a signature that is not one of a model of these shapes.
    """
    first, second = _groups(shapes, one), _groups(shapes, other)
    distances = {group: _relative(first[group], second[group]) for group in first}
    where = max(distances, key=lambda group: distances[group])
    return distances[where], where


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 in hex over names and values, the values as little-endian float32."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _places(name: str, shape: tuple[int, ...]) -> list[tuple[int, list[int]]]:
    """(row, columns in it), several times."""
    places = []
    for i in range(_num_rows(name)):
        row, *columns = _PLACES.unpack(hashlib.sha256(f"{name} {i}".encode()).digest())
        places.append((row % shape[0], [column % shape[1] for column in columns]))
    return places


def _num_rows(name: str) -> int:
    return _ROWS_IN_LAYERS if ".layers." in name else _ROWS_ELSEWHERE


def _groups(shapes: Shapes, signature: str) -> Mapping[str, np.ndarray]:
    """The values of a signature by what they are compared in: a projection's belong to its layer and its kind."""
    try:
        values = np.frombuffer(base64.b64decode(signature, validate=True), "<f2").astype(np.float64)
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"the base model's signature is damaged ({error})") from error
    names = [name for name, shape in shapes.items() if len(shape) == 2]
    ends = np.cumsum([_VALUES * _num_rows(name) for name in names])
    if ends[-1] != len(values):
        raise CheckpointError(
            f"the base model's signature has {len(values)} values; its sizes want {ends[-1]}"
        )
    groups: dict[str, list[np.ndarray]] = {}
    for name, part in zip(names, np.split(values, ends[:-1]), strict=True):
        for group in _groups_of(name):
            groups.setdefault(group, []).append(part)
    return {group: np.concatenate(parts) for group, parts in groups.items()}


def _groups_of(name: str) -> tuple[str, ...]:
    stem = name.removesuffix(".weight").split(".")
    return (f"layer {stem[2]}", stem[-1]) if ".layers." in name else (stem[-1],)


def _relative(one: np.ndarray, other: np.ndarray) -> float:
    size = max(np.linalg.norm(one), np.linalg.norm(other))
    return float(np.linalg.norm(one - other) / size) if size else 0.0


def _bytes(tensor: Tensor) -> bytes:
    return bytes(_numpy(tensor).astype("<f4", copy=False).tobytes())


def _numpy(tensor: Tensor) -> np.ndarray:
    values: np.ndarray = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return values
