"""Bytes that a decoded token reads, so that quality can be compared at equal speed."""

from __future__ import annotations

from ..bench.ideal import bytes_per_token
from ..config import FlexiDepthConfig
from .points import BASE, RANDOM, SHORTGPT, SHORTGPT_ROUTED


def bytes_read(
    method: str, config: FlexiDepthConfig, skipped: float, weight_bytes: int = 2
) -> float:
    """Bytes of weights that decoding one token reads, on an empty cache.

    As in `flexidepth.bench.ideal`: a model with routers reads them, and the adapters of the layers it skips.
    Layers skipped at random have neither, but compute keys and values; dropped ones are not read at all.

    Args:
        method: "base", a baseline of METHODS, or anything else for a model with routers.
        config: of the model with its adapters (their width counts). skipped: layers a token skips in the mean.
    """
    dropped = method in (SHORTGPT, SHORTGPT_ROUTED)
    routers = not dropped and method not in (BASE, RANDOM)
    full, one_less = (
        bytes_per_token(config, number, weight_bytes=weight_bytes, routers=routers)
        for number in (0, 1)
    )
    saved = full - one_less
    d = config.hidden_size
    if not routers:
        saved += weight_bytes * 3 * d * config.adapter_dim
    if dropped:
        saved += weight_bytes * (2 * d * config.num_key_value_heads * config.head_dim + 2 * d)
    return float(full - skipped * saved)
