"""A start for routers: layers whose skipping costs little are skipped first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling import FlexiDepthForCausalLM
from .head_loss import head_losses

_SPREAD = 1.0  # of the biases, in logits
_SHRINK = 0.2  # of the head's weights: the order starts out the same for all tokens, nearly


@torch.no_grad()
def skip_costs(model: FlexiDepthForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """KL(base model || model) a token when one routed layer is skipped by every token: float32 [routed layers].

    Args:
        batch: as training.packing.collate makes it.
    """
    model.eval()
    device = model.device
    half = model.model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        return _costs(model, batch)


def _costs(model: FlexiDepthForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    device = model.device
    inputs = {
        name: batch[name].to(device) for name in ("input_ids", "position_ids", "attention_mask")
    }
    labels = batch["labels"].to(device)
    base = model.model(**inputs, use_cache=False, force_routing="dense").last_hidden_state
    layers = list(model.config.routing_layers)
    costs = []
    for layer in layers:
        kept = [other for other in layers if other != layer]
        out = model.model(**inputs, use_cache=False, force_routing=kept or "none")
        losses = head_losses(
            out.last_hidden_state, model.lm_head.weight, labels, base_hidden=base, kl_weight=1.0
        )
        costs.append(losses.kl / (labels[:, 1:] != -100).sum())
    return torch.stack(costs)


@torch.no_grad()
def order_layers(
    model: FlexiDepthForCausalLM, batch: dict[str, Tensor], *, middle: float
) -> Tensor:
    """Set the routers' biases by the logarithms of `skip_costs`, around `middle`; returns the costs.

    The routers must have biases.
    """
    routed = model.routed_layers()
    costs = skip_costs(model, batch)
    scores = costs.clamp(min=1e-9).log()
    scores = (scores - scores.mean()) / scores.std().clamp(min=1e-6)
    for layer, score in zip(routed, scores.tolist(), strict=True):
        layer.router.head.bias.fill_(middle + _SPREAD * score)
        layer.router.head.weight.mul_(_SHRINK)
    return costs
