"""What a forward pass is given, checked and completed: arguments, positions, attention mask."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .errors import ShapeError, UnsupportedError, ValueOutOfRangeError

# What transformers hands to every model, and what has no meaning here.
_HANDED_IN = ("cache_position", "return_dict", "token_type_ids")


def check_arguments(extra: dict[str, Any], known: Sequence[str]) -> None:
    """Refuse arguments that would be ignored: a misspelt force_routing, packed sequences, attention weights.

    extra: the arguments beside those in the signature. known: the names to propose.
    """
    if extra.get("output_attentions"):
        raise UnsupportedError(
            "forward: output_attentions is not implemented; attention runs fused and without skipped queries"
        )
    if extra.get("return_dict") is False:
        raise UnsupportedError("forward: return_dict=False is not implemented; use out.to_tuple()")
    for name, value in extra.items():
        if name in _HANDED_IN or value is None or value is False:
            continue
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
        raise ValueOutOfRangeError(f"forward: no argument {name!r}{hint}")


def check_attention_mask(mask: Tensor | None, batch: int, past: int, tokens: int) -> None:
    """Raise ShapeError unless the mask covers the cached and the new tokens."""
    if mask is None:
        return
    keys = past + tokens
    if mask.dim() == 2 and mask.shape == (batch, keys):
        return
    if mask.dim() == 4 and mask.shape[1:3] == (1, tokens) and mask.shape[3] >= keys:
        return
    raise ShapeError(
        f"forward: attention_mask is {list(mask.shape)}; wanted [{batch}, {keys}] ({past} cached and "
        f"{tokens} new tokens) or [{batch}, 1, {tokens}, {keys}]"
    )


def token_positions(
    attention_mask: Tensor | None, batch: int, past: int, tokens: int, device: torch.device
) -> Tensor:
    """Positions [batch, tokens] counted over the tokens that are not padding."""
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + tokens, device=device).expand(batch, -1)
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.clamp(min=0)[:, past : past + tokens]


def visible_keys(
    attention_mask: Tensor | None,
    batch: int,
    past: int,
    tokens: int,
    sliding_window: int | None,
    device: torch.device,
) -> Tensor:
    """Boolean [batch, tokens, keys]: causal by cache slot, without padding; a token always sees itself."""
    keys = past + tokens
    slots = torch.arange(keys, device=device)
    own = torch.arange(past, past + tokens, device=device)
    allowed = reference.attention_mask(own, slots, sliding_window).expand(batch, -1, -1)
    if attention_mask is None:
        return allowed
    if attention_mask.dim() == 2:
        visible = attention_mask.bool()[:, None]
    else:  # [batch, 1, tokens, keys], boolean or 0 / -inf: what generate() makes for a static cache
        full = attention_mask[:, 0, :, :keys]
        visible = full if full.dtype == torch.bool else full >= 0
    return (allowed & visible) | (own[:, None] == slots)
