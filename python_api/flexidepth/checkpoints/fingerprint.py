"""Which base model a routing was trained on, told by the base's norms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def base_fingerprint(num_layers: int, read: Callable[[Iterable[str]], Iterator[Tensor]]) -> str:
    """sha256 in hex over the norms' weights as little-endian float32, layer by layer.

    Of each layer input_layernorm and post_attention_layernorm, then model.norm. Norms, because every storage
    type keeps them exactly: a quantised copy of a base model is the same base model.

    Args:
        num_layers: layers of the base model.
        read: gives its tensors for a sequence of canonical names.
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


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 in hex over names and values, the values as little-endian float32."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    return bytes(values.astype("<f4", copy=False).tobytes())
