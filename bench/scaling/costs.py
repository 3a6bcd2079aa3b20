"""Bytes that a decoding step reads from memory.

    weights   every layer: K, V and norms; if any row runs it: Q, O and feed-forward; if any row skips it: the adapter
    routers   folded, float32, all of them
    cache     keys and values of the context, for every row and every layer that this row runs
    head      the LM head, once; activations and one row of the embedding are negligible

One row is a token of one sequence; B rows share the weights, not the cache. In bf16 with one row this is
`flexidepth.bench.ideal`.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexidepth.config import FlexiDepthConfig

from .precision import Precision


@dataclass(frozen=True)
class Layers:
    """Layers that a step of some rows needs; means are allowed, as everything that follows is linear in them.

    running: routed layers that one row or more runs. skipping: routed layers that one row or more skips.
    attending: rows that run, summed over the routed layers.
    """

    rows: int
    running: float
    skipping: float
    attending: float


def layers_of_token(config: FlexiDepthConfig, skipped: float) -> Layers:
    """One row that skips so many layers."""
    run = config.num_routed_layers - skipped
    return Layers(1, run, skipped, run)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a layer's weights. always: K, V and norms. runs: Q, O and feed-forward. skips: the adapter."""

    always: float
    runs: float
    skips: float


def layer_bytes(config: FlexiDepthConfig, precision: Precision) -> LayerBytes:
    """Of one layer, without its router."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = _widths(config)
    each = precision.weight_bytes
    return LayerBytes(
        each * 2 * d * kv + precision.other_bytes * 2 * d,
        each * (2 * d * q + 3 * d * f),
        each * 3 * d * config.adapter_dim,
    )


def head_bytes(config: FlexiDepthConfig, precision: Precision) -> float:
    """Of the LM head."""
    return precision.head_bytes * config.vocab_size * config.hidden_size


def step_bytes(
    config: FlexiDepthConfig,
    precision: Precision,
    layers: Layers,
    *,
    context: int = 0,
    routers: bool = True,
) -> float:
    """Bytes that a step reads, `context` tokens in the cache of each row; routers = False: the plain dense model."""
    routed = config.num_routed_layers
    plain = config.num_hidden_layers - routed
    weights = layer_bytes(config, precision)
    attending = plain * layers.rows + layers.attending
    return (
        config.num_hidden_layers * weights.always
        + (plain + layers.running) * weights.runs
        + layers.skipping * weights.skips
        + head_bytes(config, precision)
        + (4 * routed * config.hidden_size * config.router_dim if routers else 0)
        + attending * context * _cache_bytes(config, precision)
    )


def token_bytes(
    config: FlexiDepthConfig, precision: Precision, skipped: float, *, context: int = 0
) -> float:
    """Bytes of a token that skips so many layers."""
    return step_bytes(config, precision, layers_of_token(config, skipped), context=context)


def dense_bytes(
    config: FlexiDepthConfig, precision: Precision, *, rows: int = 1, context: int = 0
) -> float:
    """Bytes of a step of the plain dense model."""
    routed = config.num_routed_layers
    layers = Layers(rows, routed, 0, rows * routed)
    return step_bytes(config, precision, layers, context=context, routers=False)


def resident_bytes(
    config: FlexiDepthConfig, precision: Precision, *, rows: int = 1, context: int = 0
) -> float:
    """Bytes that lie in memory: both paths of every layer, head and embedding (one matrix where they are tied), and
    the cache, which has no holes."""
    routed = config.num_routed_layers
    weights = step_bytes(config, precision, Layers(0, routed, routed, 0))
    if not config.tie_word_embeddings:
        weights += head_bytes(config, precision)
    cached = rows * context * config.num_hidden_layers
    return weights + cached * _cache_bytes(config, precision)


def _cache_bytes(config: FlexiDepthConfig, precision: Precision) -> float:
    """Keys and values of one token in one layer."""
    return precision.other_bytes * 2 * _widths(config)[1]


def _widths(config: FlexiDepthConfig) -> tuple[int, int]:
    """Of queries and of keys."""
    return (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
