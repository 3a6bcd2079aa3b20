"""Losses through the head, chunk by chunk, against torch's own over whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flexidepth.training import head_loss
from flexidepth.training.head_loss import head_losses


def whole(hidden, head, labels, base, lm_weight, kl_weight):
    """The same by torch, every logit at once."""
    targets = labels[:, 1:].flatten()
    used = targets != -100
    logits = (hidden[:, :-1].flatten(0, 1) @ head.T)[used]
    lm = F.cross_entropy(logits, targets[used], reduction="sum")
    base_logits = (base[:, :-1].flatten(0, 1) @ head.T)[used]
    kl = F.kl_div(
        logits.log_softmax(-1), base_logits.log_softmax(-1), reduction="sum", log_target=True
    )
    base_lm = F.cross_entropy(base_logits, targets[used], reduction="sum")
    agreed = (logits.argmax(-1) == base_logits.argmax(-1)).sum()
    return lm_weight * lm + kl_weight * kl, lm, kl, base_lm, agreed


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 13, 16, generator=generator).requires_grad_()
    base = hidden.detach() + 0.3 * torch.randn(2, 13, 16, generator=generator)
    head = torch.randn(37, 16, generator=generator)
    labels = torch.randint(0, 37, (2, 13), generator=generator)
    labels[0, :4] = -100
    labels[1, 9:] = -100
    return hidden, head, labels, base


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("chunk", [5 * 37, 1 << 20])
def test_values_and_gradient_are_those_of_whole_logits(inputs, weights, chunk, monkeypatch):
    monkeypatch.setattr(head_loss, "_CHUNK_ELEMENTS_ON_CPU", chunk)
    hidden, head, labels, base = inputs
    got = head_losses(
        hidden, head, labels, base_hidden=base, lm_weight=weights[0], kl_weight=weights[1]
    )
    want = whole(hidden, head, labels, base, *weights)
    for ours, theirs in zip(
        (got.total, got.lm, got.kl, got.base_lm, got.agreed), want, strict=True
    ):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad(0.1 * got.total, hidden)
    (theirs,) = torch.autograd.grad(0.1 * want[0], hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert theirs.abs().max() > 1e-3


def test_without_the_base_model(inputs):
    hidden, head, labels, _ = inputs
    got = head_losses(hidden, head, labels)
    torch.testing.assert_close(got.total, got.lm)
    assert got.kl.isnan() and got.base_lm.isnan() and got.agreed.isnan()
    with pytest.raises(ValueError, match="base_hidden"):
        head_losses(hidden, head, labels, kl_weight=1.0)


def test_nothing_to_predict(inputs):
    hidden, head, labels, base = inputs
    got = head_losses(hidden, head, torch.full_like(labels, -100), base_hidden=base, kl_weight=1.0)
    got.total.backward()
    assert got.total == 0 and not hidden.grad.any()


@torch.no_grad()
def test_no_gradient_is_computed_where_none_is_wanted(inputs):
    hidden, head, labels, base = inputs
    got = head_losses(hidden.detach(), head, labels, base_hidden=base, kl_weight=1.0)
    want = whole(hidden, head, labels, base, 1.0, 1.0)
    torch.testing.assert_close(got.total, want[0])
    assert not got.total.requires_grad
