"""Bytes that a decoded token reads, so that quality can be compared at equal speed."""

from __future__ import annotations

from ..bench.ideal import bytes_per_token
from ..config import FlexiDepthConfig, has_adapter, keeps_skipped_kv
from .points import BASE, RANDOM, RANDOM_ADAPTERS, SHORTGPT, SHORTGPT_ROUTED, STATIC_ADAPTERS


def bytes_read(
    method: str, config: FlexiDepthConfig, skipped: float, weight_bytes: int = 2
) -> float:
    """Bytes of weights that decoding one token reads, on an empty cache.

    As in `flexidepth.bench.ideal`: a model with routers reads them, and the adapters of the layers it skips; layers
    that are chosen before need no routers. Layers skipped at random without adapters compute keys and values; dropped
    ones are not read at all.

    Args:
        method: "base", a baseline of METHODS, or anything else for a model with routers.
        config: of the model with its adapters (their width counts). skipped: layers a token skips in the mean.
    """
    dropped = method in (SHORTGPT, SHORTGPT_ROUTED)
    adapters = not dropped and method not in (BASE, RANDOM)
    routers = adapters and method not in (STATIC_ADAPTERS, RANDOM_ADAPTERS)
    full, one_less = (
        bytes_per_token(config, number, weight_bytes=weight_bytes, routers=routers)
        for number in (0, 1)
    )
    saved = full - one_less
    d = config.hidden_size
    if routers and config.ablations:
        return _ablated(config, float(full), skipped, weight_bytes)
    if not adapters:
        saved += weight_bytes * 3 * d * config.adapter_dim
    if dropped:
        saved += weight_bytes * (2 * d * config.num_key_value_heads * config.head_dim + 2 * d)
    return float(full - skipped * saved)


def _ablated(config: FlexiDepthConfig, full: float, skipped: float, weight_bytes: int) -> float:
    """A model with ablations: `full` is what it would read without them and without skipping."""
    d, dim = config.hidden_size, config.head_dim
    ablations = config.ablations
    saved = 0
    if "feed_forward_only" not in ablations:
        saved += 2 * d * config.num_attention_heads * dim
    if "attention_only" not in ablations:
        saved += 3 * d * config.intermediate_size
    if has_adapter(ablations):
        saved -= 3 * d * config.adapter_dim
    if not keeps_skipped_kv(ablations):
        saved += 2 * d * config.num_key_value_heads * dim
    if "linear_router" in ablations:
        full -= 4 * config.num_routed_layers * d * (config.router_dim - 1)
    return full - skipped * weight_bytes * saved
