"""A start for adapters: each takes over those neurons of its layer's feed-forward that explain the layer best.

An adapter is a feed-forward of a neurons where its layer has f. With the activations of all f of them over some
text, A [tokens, f] = silu(y W_gate) * (y W_up), and the changes that the layer makes, T [tokens, d], the a
columns of A that explain T best are chosen one after the other (orthogonal least squares: Chen, Billings & Luo
1989, doi 10.1080/00207178908953472), and the output matrix is their least-squares fit to T. Only A^T A and
A^T T are kept, so the text may be long; nothing is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling import FlexiDepthForCausalLM
from .replaced import Replaced, replaced_parts

_RIDGE = 1e-4  # of the mean of the diagonal of A^T A
_TINY = torch.finfo(torch.float32).tiny
_HELD_BYTES = 4 << 30  # of A^T A and A^T T at a time; more layers than fit take turns


@torch.no_grad()
def fit_adapters(
    model: FlexiDepthForCausalLM, batches: Callable[[], Iterable[dict[str, Tensor]]]
) -> None:
    """Set the adapters of all routed layers from what their layers do to the text.

    Tokens count with 1 / |layer(h)|^2, as in objective.adapter_distances.

    Args:
        model: with adapters, in any mode; left in evaluation mode.
        batches: what gives them, as training.packing.collate makes them, as often as it is called.
    """
    model.eval()
    routed = model.routed_layers()
    f, d = routed[0].mlp.up_proj.weight.shape
    together = max(1, _HELD_BYTES // (8 * f * (f + d)))
    for first in range(0, len(routed), together):
        layers = routed[first : first + together]
        for layer, (gram, cross) in zip(layers, _products(model, layers, batches()), strict=True):
            adapter = layer.adapter
            width = adapter.up_proj.weight.shape[0]
            chosen, output = select_columns(gram, cross, min(width, f))
            _put(adapter.gate_proj.weight, layer.mlp.gate_proj.weight[chosen])
            _put(adapter.up_proj.weight, layer.mlp.up_proj.weight[chosen])
            _put(adapter.down_proj.weight.T, output)


def select_columns(gram: Tensor, cross: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Columns of A that explain T best, chosen one after the other, and their least-squares fit.

    A pivoted Cholesky factorisation of A^T A that takes as its next pivot the column whose part orthogonal to
    those before takes most off |T - A W|^2.

    Args:
        gram: A^T A, float64 [columns, columns]. cross: A^T T, float64 [columns, targets]. number: to choose.

    Returns:
        int64 [number], in the order of choice, and W float64 [number, targets] with A[:, chosen] W close to T.
    """
    size = gram.shape[0]
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=_TINY)
    left = gram.diagonal() + ridge  # squared lengths of the orthogonal parts
    power = cross.pow(2).sum(1)  # |A_j^T R|^2, R what is still unexplained of T
    factor = gram.new_zeros(size, number)
    solved = cross.new_zeros(number, cross.shape[1])
    chosen: list[int] = []
    for step in range(number):
        gain = power / left
        gain[chosen] = -torch.inf
        pivot = int(gain.argmax())
        length = left[pivot].sqrt()
        column = gram[:, pivot] - factor[:, :step] @ factor[pivot, :step]
        column[pivot] += ridge
        column /= length
        row = (cross[pivot] - factor[pivot, :step] @ solved[:step]) / length
        along = cross @ row - factor[:, :step] @ (solved[:step] @ row)
        power = (power + column * (column * row.dot(row) - 2 * along)).clamp(min=0.0)
        left = (left - column.pow(2)).clamp(min=ridge)
        factor[:, step], solved[step] = column, row
        chosen.append(pivot)
    picked = torch.tensor(chosen, device=gram.device)
    triangle = factor[picked].tril()
    return picked, torch.linalg.solve_triangular(triangle.T, solved, upper=True)


def _products(
    model: FlexiDepthForCausalLM, layers: Sequence[Any], batches: Iterable[dict[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """(A^T A, A^T T) of each layer, float64."""
    half = model.model.embed_tokens.weight.dtype == torch.bfloat16
    sums: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        names = ("input_ids", "position_ids", "attention_mask")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            parts = replaced_parts(model, layers, {name: batch[name] for name in names})
        counted = (batch["document_ids"] >= 0).flatten()
        both = [_activations(*pair, counted) for pair in zip(layers, parts, strict=True)]
        own = [((a.T @ a).double(), (a.T @ t).double()) for a, t in both]
        if sums:
            own = [(g + h, c + e) for (g, c), (h, e) in zip(sums, own, strict=True)]
        sums = own
    return sums


def _activations(layer: Any, part: Replaced, counted: Tensor) -> tuple[Tensor, Tensor]:
    """A and T of a batch, float32 [tokens, f] and [tokens, d], each token over the length of what it becomes."""
    y, change, out = (
        value.flatten(0, 1)[counted].float() for value in (part.y, part.change, part.out)
    )
    gate, up = (m.weight.float() for m in (layer.mlp.gate_proj, layer.mlp.up_proj))
    share = out.norm(dim=-1, keepdim=True).clamp(min=_TINY).reciprocal()
    return F.silu(y @ gate.T) * (y @ up.T) * share, change * share


def _put(parameter: Tensor, value: Tensor) -> None:
    parameter[: value.shape[0], : value.shape[1]] = value.to(parameter.dtype)
