"""Next-token losses through a frozen LM head, chunk by chunk: logits of all tokens never exist at once.

For a token t with label n, p = softmax(W h) the model's and q = softmax(W h_base) the base model's
distribution:

    L_t = lm_weight * -log p(n) + kl_weight * sum_v q(v) log(q(v) / p(v))
    dL_t / d logits = lm_weight * (p - onehot(n)) + kl_weight * (p - q)

The gradient of the hidden states is computed beside the losses, while a chunk's logits are at hand; the
head is frozen and gets none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
# Logits of a chunk: 128 MiB in float32, or what stays in a processor's cache.
_CHUNK_ELEMENTS = 1 << 25
_CHUNK_ELEMENTS_ON_CPU = 1 << 22


@dataclass(frozen=True)
class HeadLosses:
    """Sums over the labelled tokens, float32 scalars.

    total: what is differentiated. lm, kl: the two parts unweighted. base_lm: the base model's own LM loss,
    NaN when its hidden states were not given, as is kl. agreed: tokens on whose first choice the two agree.
    """

    total: Tensor
    lm: Tensor
    kl: Tensor
    base_lm: Tensor
    agreed: Tensor


def head_losses(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    base_hidden: Tensor | None = None,
    lm_weight: float = 1.0,
    kl_weight: float = 0.0,
) -> HeadLosses:
    """Losses of predicting labels[:, t + 1] from hidden[:, t], summed.

    Args:
        hidden: [batch, tokens, d], normed. head: [vocab, d], frozen. labels: int64 [batch, tokens], -100 where
            nothing is to be predicted. base_hidden: as hidden, of the base model.

    Raises:
        ValueError: kl_weight without base_hidden.
    """
    if kl_weight and base_hidden is None:
        raise ValueError("head_losses: kl_weight needs base_hidden, the base model's hidden states")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (targets != IGNORED).nonzero().flatten()
    chosen = hidden.flatten(0, 1).index_select(0, rows)
    base = None if base_hidden is None else base_hidden.flatten(0, 1).index_select(0, rows)
    total, *parts = _HeadLosses.apply(  # type: ignore[no-untyped-call]
        chosen, head, targets[rows], base, lm_weight, kl_weight
    )
    return HeadLosses(total, *parts)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        base: Tensor | None,
        lm_weight: float,
        kl_weight: float,
    ) -> tuple[Tensor, ...]:
        wanted = hidden.requires_grad
        gradient = torch.empty_like(hidden) if wanted else None
        sums = torch.zeros(4, dtype=torch.float64, device=hidden.device)
        most = _CHUNK_ELEMENTS_ON_CPU if hidden.device.type == "cpu" else _CHUNK_ELEMENTS
        chunk = max(1, most // head.shape[0])
        space = _Workspace(min(chunk, len(targets)), head)
        for start in range(0, len(targets), chunk):
            own = slice(start, start + chunk)
            slope = _chunk(
                hidden[own],
                head,
                targets[own],
                None if base is None else base[own],
                (lm_weight, kl_weight),
                sums,
                wanted,
                space,
            )
            if gradient is not None and slope is not None:
                gradient[own] = slope
        if base is None:
            sums[1:] = float("nan")
        lm, kl, base_lm, agreed = sums.float().unbind()
        total = lm_weight * lm + (kl_weight * kl if kl_weight else 0.0)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(lm, kl, base_lm, agreed)
        return total, lm, kl, base_lm, agreed

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0].to(gradient.dtype), None, None, None, None, None


class _Workspace:
    """Buffers of one chunk, used again by the next: three of float32 and one of the head's type, [rows, vocab]."""

    def __init__(self, rows: int, head: Tensor) -> None:
        def buffer(dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, head.shape[0], dtype=dtype, device=head.device)

        self.logits = buffer(head.dtype)
        self.logp, self.base_logp, self.base_p = (buffer(torch.float32) for _ in range(3))


def _chunk(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    base: Tensor | None,
    weights: tuple[float, float],
    sums: Tensor,
    wanted: bool,
    space: _Workspace,
) -> Tensor | None:
    """Adds a chunk's losses to sums (lm, kl, base lm, agreed) and gives the gradient of its hidden states."""
    lm_weight, kl_weight = weights
    logits = space.logits[: len(targets)]
    logp = _log_softmax(hidden, head, logits, space.logp)
    lm = -logp.gather(1, targets[:, None])[:, 0]
    sums[0] += lm.sum(dtype=torch.float64)
    slope = None
    if base is not None:
        base_logp = _log_softmax(base, head, logits, space.base_logp)
        sums[2] -= base_logp.gather(1, targets[:, None]).sum(dtype=torch.float64)
        sums[3] += (logp.argmax(1) == base_logp.argmax(1)).sum()
        q = torch.exp(base_logp, out=space.base_p[: len(targets)])
        sums[1] += torch.linalg.vecdot(q, base_logp.sub_(logp)).sum(dtype=torch.float64)
        if wanted:
            # (lm + kl) p - kl q, and the label's lm: one buffer, overwritten.
            slope = logp.exp_().mul_(lm_weight + kl_weight).sub_(q, alpha=kl_weight)
    elif wanted:
        slope = logp.exp_().mul_(lm_weight)
    if slope is None:
        return None
    slope.scatter_add_(1, targets[:, None], slope.new_full((len(targets), 1), -lm_weight))
    return logits.copy_(slope) @ head


def _log_softmax(hidden: Tensor, head: Tensor, logits: Tensor, into: Tensor) -> Tensor:
    """float32 [rows, vocab]; the logits are overwritten."""
    torch.mm(hidden.to(head.dtype), head.T, out=logits)
    return torch.log_softmax(logits, -1, dtype=torch.float32, out=into[: len(hidden)])
