"""Block influence: how much a layer changes what passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base_model import base_model_of

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint


def block_influence(checkpoint: Checkpoint, windows: Sequence[Sequence[int]]) -> list[float]:
    """BI_l = 1 - mean over tokens of cos(input, output of layer l), of each layer of the base model.

    ShortGPT (Men et al. 2024, arXiv 2403.03853). Computed with transformers' own model in float32, whose
    weights take 4 bytes each while this runs.

    Args:
        windows: token ids of calibration texts.
    """
    model = base_model_of(checkpoint.config, checkpoint.tensors())
    layers = list(model.model.layers)
    sums = [0.0] * len(layers)

    def watch(index: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            sums[index] += _cosines(before, after)

        return hook

    handles = [
        layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    with torch.inference_mode():
        for window in windows:
            model.model(torch.tensor([list(window)]), use_cache=False)
    for handle in handles:
        handle.remove()
    tokens = sum(map(len, windows))
    return [1 - total / tokens for total in sums]


def _cosines(before: Tensor, after: Tensor) -> float:
    """Sum over tokens."""
    return float(torch.nn.functional.cosine_similarity(before, after, dim=-1).double().sum())
