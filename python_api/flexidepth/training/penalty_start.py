"""A start for a steered layer penalty, and whether a stage met its target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modeling import FlexiDepthForCausalLM
from .objective import RoutingObjective, Weights
from .recipe import Stage

_MISS = 0.5  # layers
_LAST_STEPS = 10  # over which training text is averaged
_INPUTS = ("input_ids", "labels", "position_ids", "attention_mask", "document_ids")


def balancing_penalty(
    model: FlexiDepthForCausalLM, batch: Mapping[str, Tensor], weights: Weights
) -> float:
    """alpha at which the layer penalty draws the logits of all gates down as much as the rest of the loss up.

    Below it routers first learn to run every layer, from where they are slow to come back. 0 or below where the
    rest of the loss draws them down by itself, 0 where all gates are at their ends and nothing moves them.

    Args:
        batch: as training.packing.collate makes it.
    """
    objective, device = RoutingObjective(model).train(), model.device
    inputs = {name: batch[name].to(device) for name in _INPUTS}
    half = model.model.embed_tokens.weight.dtype == torch.bfloat16

    def rise(alpha: float) -> float:
        """How much the loss grows with the logits of all gates."""
        offset = torch.zeros(len(inputs["input_ids"]), device=device, requires_grad=True)
        own = dataclasses.replace(weights, skip_penalty=alpha)
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, torch.bfloat16, enabled=half),
        ):
            loss = objective(**inputs, weights=own, gate_offset=offset)["loss"]
        return -float(torch.autograd.grad(loss, offset)[0].sum())

    rest = rise(0.0)
    penalty = rise(1.0) - rest
    return -rest / penalty if penalty > 0 else 0.0


def missed_target(stage: Stage, history: Sequence[Mapping[str, Any]]) -> str | None:
    """What to tell the user where a stage ends away from its target_layers_skipped, else None.

    Args:
        history: the Trainer's log; held-out text counts, without it the training text of the last steps.
    """
    target, found = stage.target_layers_skipped, _skipped(history)
    if target is None or found is None or abs(found[0] - target) <= _MISS:
        return None
    skipped, text = found
    more = "a larger skip_penalty" if skipped < target else "a smaller skip_penalty"
    alpha = next((row["alpha"] for row in reversed(history) if "alpha" in row), None)
    at = "" if alpha is None else f" (it ended at {alpha:.2g})"
    return (
        f"stage {stage.name}: {text} skips {skipped:.2f} layers at its end, target_layers_skipped is {target:g}: give "
        f"more tokens (it had {stage.tokens}), {more}{at}, or budgets: [{target:g}], which a threshold meets"
    )


def _skipped(history: Sequence[Mapping[str, Any]]) -> tuple[float, str] | None:
    """Mean layers skipped at the end, and of what text."""
    held_out = [row["eval_layers_skipped"] for row in history if "eval_layers_skipped" in row]
    if held_out:
        return float(held_out[-1]), "held-out text"
    rows = [row for row in history if "layers_skipped" in row]
    last = [r["layers_skipped"] for r in rows if r["step"] > rows[-1]["step"] - _LAST_STEPS]
    return (sum(last) / len(last), "training text") if last else None
