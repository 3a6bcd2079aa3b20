"""What training minimises: next-token loss plus the penalty on layers used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..modeling import FlexiDepthForCausalLM
from .head_loss import head_losses
from .replaced import replaced_parts

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Weights:
    """Weights of the parts of the loss.

    lm: of -log p(next token). kl: of KL(base model || model). skip_penalty: alpha of the layer penalty.
    adapter: of the adapters' distance to their layers, see `adapter_distances`.
    """

    lm: float = 1.0
    kl: float = 0.0
    skip_penalty: float = 0.0
    adapter: float = 0.0


@dataclass(frozen=True)
class Counts:
    """Labels and tokens of a whole optimiser step, over which the sums of all its batches are averaged."""

    labels: Tensor
    tokens: Tensor


def skip_penalty(gates: Tensor, token_mask: Tensor) -> Tensor:
    """Sum over the tokens of (sum_l w_l)^2, the skip loss before its mean (FlexiDepth, eq. 6).

    Args:
        gates: w, float32 [batch, tokens, routed layers]. token_mask: bool [batch, tokens], False = padding.
    """
    return (gates.sum(-1).pow(2) * token_mask).sum()


class RoutingObjective(nn.Module):
    """A model and its loss in one module, so that whatever wraps it for several GPUs sees one forward pass."""

    def __init__(self, model: FlexiDepthForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        document_ids: Tensor,
        weights: Weights,
        counts: Counts | None = None,
        gate_offset: Tensor | None = None,
        price: Tensor | None = None,
        compare: bool = False,
    ) -> dict[str, Any]:
        """Loss of a batch, and what is logged about it.

        Args:
            input_ids, labels, position_ids: int64 [batch, tokens]; attention_mask: bool [batch, 1, tokens, tokens];
                document_ids: [batch, tokens], negative = padding; as training.packing.collate makes them.
            counts: of the whole optimiser step; None = of this batch.
            gate_offset: float32 [batch], see FlexiDepthModel.
            price: float32 [batch], added to the loss for each layer that a token runs, times its gate.
            compare: the base model's own loss beside the model's, also with a KL weight of 0.

        Returns:
            loss, and detached sums: lm, kl, base_lm, agreed (over the labels), penalty (over the tokens),
            skipped [batch, routed layers] (tokens that skip), labels, tokens [batch]; slopes, a GateSlopes that
            the backward pass fills where there are prices.
        """
        token_mask = document_ids >= 0
        if counts is None:
            counts = Counts((labels[:, 1:] != -100).sum(), token_mask.sum())
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
        }
        if weights.adapter:
            return self._adapters(inputs, token_mask, weights.adapter, counts)
        slopes = GateSlopes(self.model)
        with slopes.watching() if price is not None else nullcontext():
            out = self.model.model(
                **inputs,
                use_cache=False,
                gate_offset=gate_offset,
                output_base_hidden_state=compare or weights.kl > 0,
            )
        losses = head_losses(
            out.last_hidden_state,
            self.model.lm_head.weight,
            labels,
            base_hidden=out.base_hidden_state,
            lm_weight=weights.lm,
            kl_weight=weights.kl,
        )
        penalty = skip_penalty(out.gates, token_mask)
        loss = losses.total / counts.labels + weights.skip_penalty * penalty / counts.tokens
        if price is not None:
            credit = torch.ones_like(out.gates) if out.credit is None else out.credit
            credit = credit * token_mask[..., None]
            slopes.read(credit)
            loss = loss + (price * (out.gates * credit).sum((1, 2))).sum() / counts.tokens
        sums = {
            "lm": losses.lm,
            "kl": losses.kl,
            "base_lm": losses.base_lm,
            "agreed": losses.agreed,
        }
        return {
            "loss": loss,
            "penalty": penalty.detach(),
            "skipped": (self._skips(out.gates) & token_mask[..., None]).sum(1),
            "labels": (labels[:, 1:] != -100).sum(),
            "tokens": token_mask.sum(1),
            "slopes": slopes,
            **{name: value.detach() for name, value in sums.items()},
        }

    def _skips(self, gates: Tensor) -> Tensor:
        """What the thresholds alone would skip: neither drawn nor explored decisions, which end with training."""
        thresholds = self.model.config.router_thresholds
        return ~reference.decide(gates, torch.tensor(thresholds, device=gates.device))

    def _adapters(
        self, inputs: dict[str, Tensor], token_mask: Tensor, weight: float, counts: Counts
    ) -> dict[str, Any]:
        distances = adapter_distances(self.model, inputs, token_mask)
        return {
            "loss": weight * distances.sum() / counts.tokens,
            "adapter": distances.detach(),
            "tokens": token_mask.sum(1),
        }


class GateSlopes:
    """Mean of dL/dw over the gates of each sequence, weighted by w (1 - w) and their credit.

    Filled by the backward pass of a forward pass that ran within `watching`.
    """

    def __init__(self, model: FlexiDepthForCausalLM) -> None:
        self._model = model
        self._gates: list[Tensor] = []
        self._sums: list[Tensor] = []  # of each layer, [batch, 2]: weighted slopes, weights

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, the gates of a forward pass are noted down."""

        def note(_: nn.Module, __: Any, output: tuple[Any, ...]) -> None:
            if output[1].requires_grad:  # not those of the base model's own pass
                self._gates.append(output[1])

        hooks = [layer.register_forward_hook(note) for layer in self._model.routed_layers()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def read(self, credit: Tensor) -> None:
        """Make the noted gates report; credit float32 [batch, tokens, routed layers], 0 = of no account."""
        for i, gates in enumerate(self._gates):
            spread = (gates * (1 - gates)).detach()
            # A slope has its gate's credit in it already.
            gates.register_hook(partial(self._take, spread, credit[..., i]))  # type: ignore[no-untyped-call]
        self._gates = []

    def _take(self, spread: Tensor, credit: Tensor, slope: Tensor) -> None:
        sums = [(spread * slope).sum(1), (spread * credit).sum(1)]
        self._sums.append(torch.stack(sums, dim=1))

    def means(self) -> Tensor:
        """float32 [batch]."""
        weighted, weights = torch.stack(self._sums).sum(0).unbind(1)
        return weighted / weights.clamp(min=_TINY)


def adapter_distances(
    model: FlexiDepthForCausalLM, inputs: dict[str, Tensor], token_mask: Tensor
) -> Tensor:
    """How far each adapter is from what its layer does in the base model: float32 [routed layers].

    Sum over the tokens of r(adapter(norm h) - change) over the mean of r(change), with change = layer(h) - h (more
    in replaced.py) and r(v) = |v|^2 / |layer(h)|^2, what the next norm would see of v: 1 a token for an adapter
    that does nothing.
    The router takes no part, and every adapter learns from every token, so that routing can start from layers
    that are already replaceable.
    """
    distances = []
    layers = model.routed_layers()
    for layer, part in zip(layers, replaced_parts(model, layers, inputs), strict=True):
        with torch.no_grad():
            share = token_mask / part.out.float().pow(2).sum(-1).clamp(min=_TINY)
            size = (part.change.float().pow(2).sum(-1) * share).sum() / token_mask.sum()
        missed = (layer.adapter(part.y) - part.change).float().pow(2).sum(-1)
        distances.append((missed * share).sum() / size.clamp(min=_TINY))
    return torch.stack(distances)
