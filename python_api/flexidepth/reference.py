"""The maths of a FlexiDepth model in plain torch: the one statement that everything is tested against.

Functions take any floating dtype; what the paper computes in float32 (norm statistics, router) is computed
in float32, or float64 when the inputs are float64. Formulas: arXiv 2503.23798 and the released checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps), cast to x's dtype, times weight."""
    wide = x.to(_wide(x.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rope_inv_freq(head_dim: int, rope_parameters: dict[str, Any]) -> Tensor:
    """Rotary frequencies float32 [head_dim / 2]: theta^(-2i / head_dim), scaled by rope_type "linear" or "llama3".

    llama3 (Llama 3.1): with wavelength L = 2 pi / f, frequencies with L > original / low_freq_factor are
    divided by `factor`, those with L < original / high_freq_factor kept, those between blended.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    freq = 1.0 / (float(rope_parameters["rope_theta"]) ** exponent)
    if rope_parameters["rope_type"] == "default":
        return freq
    factor = float(rope_parameters["factor"])
    if rope_parameters["rope_type"] == "linear":
        return freq / factor
    low, high = (
        float(rope_parameters["low_freq_factor"]),
        float(rope_parameters["high_freq_factor"]),
    )
    original = float(rope_parameters["original_max_position_embeddings"])
    wavelength = 2 * math.pi / freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * freq / factor + smooth * freq
    scaled = torch.where(wavelength > original / low, freq / factor, freq)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)


def rope_cos_sin(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim] for positions [...]; angles in float32 (float64 for float64)."""
    wide = _wide(dtype)
    angles = positions.to(wide)[..., None] * inv_freq.to(positions.device, wide)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., head_dim]: x cos + rotate_half(x) sin, halves as in Llama."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def fold_router(dec: Tensor, head: Tensor) -> Tensor:
    """W_head W_dec as one vector [d_r], from dec [d, d_r] and head [1, d]; summed in float64."""
    return (head.double() @ dec.double()).reshape(-1).to(_wide(dec.dtype))


def router_gate(
    x: Tensor,
    enc: Tensor,
    norm: Tensor,
    dec: Tensor,
    head: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    order: str,
    fold: bool = False,
    offset: Tensor | None = None,
) -> Tensor:
    """Gate weights w [...] in (0, 1) for normed inputs x [..., d]; the logit is lowered by `offset`.

    z = tanh(Norm(W_enc x)) ("norm_tanh") or Norm(tanh(W_enc x)) ("tanh_norm");
    w = sigmoid(W_head W_dec z + b). fold = True multiplies W_head W_dec first.
    """
    wide = _wide(x.dtype)
    encoded = F.linear(x.to(wide), enc.to(wide))
    if order == "norm_tanh":
        z = torch.tanh(rms_norm(encoded, norm.to(wide), eps))
    elif order == "tanh_norm":
        z = rms_norm(torch.tanh(encoded), norm.to(wide), eps)
    else:
        raise ValueError(f"router order {order!r}; wanted norm_tanh or tanh_norm")
    if fold:
        logit = z @ fold_router(dec, head).to(wide)
    else:
        logit = F.linear(F.linear(z, dec.to(wide)), head.to(wide)).squeeze(-1)
    if bias is not None:
        logit = logit + bias.to(wide)
    if offset is not None:
        logit = logit - offset
    return torch.sigmoid(logit)


def decide(gates: Tensor, thresholds: Tensor | float) -> Tensor:
    """run = w > tau, strict."""
    return gates > thresholds


def linear_gate(
    x: Tensor, head: Tensor, bias: Tensor | None, *, offset: Tensor | None = None
) -> Tensor:
    """Gate weights w = sigmoid(W_head x + b - offset) [...] of a router without a hidden layer, x [..., d]."""
    wide = _wide(x.dtype)
    logit = F.linear(x.to(wide), head.to(wide)).squeeze(-1)
    if bias is not None:
        logit = logit + bias.to(wide)
    if offset is not None:
        logit = logit - offset
    return torch.sigmoid(logit)


def gate_scales(gates: Tensor, run: Tensor, *, unit: bool) -> tuple[Tensor, Tensor]:
    """(scale of the feed-forward, scale of the adapter), 0 where the path is not taken.

    w and 1 - w for multiplier gates, 1 and 1 for hard or straight-through ones (unit = True).
    """
    zero, one = torch.zeros_like(gates), torch.ones_like(gates)
    run_scale, skip_scale = (one, one) if unit else (gates, 1 - gates)
    return torch.where(run, run_scale, zero), torch.where(run, zero, skip_scale)


def sampled_scales(gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(run, scale of the feed-forward, scale of the adapter) with decisions drawn from the gates, for training.

    SparseMixer's estimator (Liu et al., arXiv 2409.12136) for two experts of probabilities w and 1 - w: the path
    taken is drawn and weighed by its probability p, in the forward pass by p / 3 where it was the less likely one
    in three of four draws (Heun's third-order rule); the derivative is that of p.
    """
    run = torch.rand_like(gates) < gates.detach()
    damped = (run != (gates > 0.5)) & (torch.rand_like(gates) < 0.75)
    taken = torch.where(run, gates, 1 - gates)
    scale = taken - torch.where(damped, taken * (2 / 3), torch.zeros_like(taken)).detach()
    zero = torch.zeros_like(scale)
    return run, torch.where(run, scale, zero), torch.where(run, zero, scale)


def compact(run: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers that run and that skip, ascending, from a boolean mask [rows]."""
    return run.nonzero().flatten().to(torch.int32), (~run).nonzero().flatten().to(torch.int32)


def attention_mask(
    q_positions: Tensor, k_positions: Tensor, sliding_window: int | None = None
) -> Tensor:
    """Boolean [..., queries, keys]: key no later than the query, and within the window where there is one."""
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v with grouped KV heads.

    q [..., heads, queries, head_dim], k and v [..., kv_heads, keys, head_dim], mask boolean broadcastable to
    [..., heads, queries, keys]. Softmax in float32 (float64 for float64). Returns q's shape.
    """
    group = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=_wide(q.dtype)).to(q.dtype) @ v


def gated_mlp(
    y: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    """SwiGLU: W_down(silu(W_gate y) * W_up y). The feed-forward, and with narrow weights the adapter."""
    hidden = F.silu(F.linear(y, gate, biases[0])) * F.linear(y, up, biases[1])
    return F.linear(hidden, down, biases[2])


def lm_head(h: Tensor, norm: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Logits W Norm(h)."""
    return F.linear(rms_norm(h, norm, eps), weight)
