"""The limit at batch 1: every weight a token uses is read once, so time follows bytes.

    bytes(N) = e [ L P_full - N (P_full - P_skip) + P_head ] + 4 L_r P_router + 2 e kv ctx (L - N)
    P_full = 2 d q + 2 d kv + 3 d f + 2 d,  P_skip = 2 d kv + 3 d f / 16 + 2 d,  P_router = d d_r

with e bytes a weight, d hidden, q and kv the widths of queries and of keys, f intermediate, L layers, L_r
routed ones, N skipped by this token, ctx tokens in the cache. Routers are float32 and folded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexidepth.config import FlexiDepthConfig

if TYPE_CHECKING:
    from torch import Tensor


def bytes_per_token(
    config: FlexiDepthConfig,
    skipped: int,
    *,
    weight_bytes: int = 2,
    context: int = 0,
    routers: bool = True,
) -> int:
    """Bytes that decoding one token reads with `skipped` layers skipped.

    routers = False is the plain dense model, whose routers do not exist.
    """
    run = config.num_routed_layers - skipped
    attended = (config.num_hidden_layers - skipped) * context
    return _bytes_read(config, weight_bytes, run, skipped, attended, routers)


def step_bytes(
    config: FlexiDepthConfig, mask: Tensor | None, weight_bytes: int, context: int, rows: int
) -> int:
    """Bytes that one step of `rows` sequences reads: each weight once if any row needs it, keys and values of each
    row that runs. mask: uint8 [rows, routed layers], 1 = run; None = the dense model, without routers."""
    layers, routed = config.num_hidden_layers, config.num_routed_layers
    if mask is None:
        return _bytes_read(config, weight_bytes, routed, 0, layers * rows * context, False)
    runs = mask.bool()
    attended = ((layers - routed) * rows + int(runs.sum())) * context
    some_run, some_skip = int(runs.any(0).sum()), int((~runs).any(0).sum())
    return _bytes_read(config, weight_bytes, some_run, some_skip, attended, True)


def _bytes_read(
    config: FlexiDepthConfig,
    weight_bytes: int,
    run: int,
    skipped: int,
    attended: int,
    routers: bool,
) -> int:
    """run, skipped: routed layers whose halves for tokens that run or skip them are read (both, where rows of a batch
    differ); attended: cached tokens that are read, over all rows and layers."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    routed = config.num_routed_layers
    weights = (
        layers * (2 * d * kv + 2 * d)
        + (layers - routed + run) * (2 * d * q + 3 * d * f)
        + skipped * 3 * d * config.adapter_dim
        + config.vocab_size * d
    )
    router = 4 * routed * d * config.router_dim if routers else 0
    return weight_bytes * weights + router + 2 * weight_bytes * kv * attended


def ideal_speedup(
    config: FlexiDepthConfig, skipped: float, *, weight_bytes: int = 2, context: int = 0
) -> float:
    """Dense bytes over bytes with a mean of `skipped` layers skipped."""
    dense = bytes_per_token(config, 0, weight_bytes=weight_bytes, context=context, routers=False)
    at_zero = bytes_per_token(config, 0, weight_bytes=weight_bytes, context=context)
    at_one = bytes_per_token(config, 1, weight_bytes=weight_bytes, context=context)
    return dense / (at_zero + skipped * (at_one - at_zero))


def flops_of_prompt(
    config: FlexiDepthConfig, tokens: int, skip_share: float, *, routers: bool = True
) -> float:
    """Multiply-adds x 2 of a prompt of `tokens` tokens when each routed layer is skipped by `skip_share`.

    Attention is counted over the causal half; the LM head over one token.
    """
    d, f = config.hidden_size, config.intermediate_size
    q, kv = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    run = 2 * d * q + 3 * d * f + q * (tokens + 1)  # scores and values: 2 q (T + 1) / 2 a token
    skip = 3 * d * config.adapter_dim
    routed = config.num_routed_layers
    plain = config.num_hidden_layers - routed
    router = d * config.router_dim if routers else 0
    per_token = plain * (run + 2 * d * kv) + routed * (
        2 * d * kv + router + (1 - skip_share) * run + skip_share * skip
    )
    return 2.0 * (tokens * per_token + config.vocab_size * d)
