"""Where the time of a decoded token goes: the CPU engine's own clock, by part of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexidepth.config import FlexiDepthConfig
from flexidepth_ext.engine import Engine

from .decode import decode_case
from .ideal import bytes_per_token
from .options import BREAKDOWN_STEPS
from .plans import Plan
from .reads import STEADY

PARTS = ("router", "keys and values", "queries and output", "attention", "feed-forward", "adapter")


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of one layer, in the mean over the layers of its kind and over tokens.

    layer: "plain" (not routed) or "run" of tokens that run every layer; "plain, others skipped" or "skipped" of tokens
    that skip every routed one. count: layers of the kind. parts: by PARTS. by_bytes: what its bytes would take at the
    rate at which the whole dense pass reads; what it takes longer is its distance from the ideal line.
    """

    layer: str
    count: int
    parts: dict[str, float]
    by_bytes: float


@dataclass(frozen=True)
class Breakdown:
    """layers: a bar each. head_ms, other_ms: of a token, outside layers, where every layer runs and where every routed
    one is skipped; other is tables, embedding and choice of the next token. model, dtype, threads, depth: as measured.
    """

    model: str
    dtype: str
    threads: int
    depth: int
    layers: list[LayerTime]
    head_ms: tuple[float, float]
    other_ms: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_breakdown(
    engine: Engine,
    run: Plan,
    skipped: Plan,
    depth: int,
    rate: float,
    *,
    model: str = "",
    steps: int = BREAKDOWN_STEPS,
) -> Breakdown:
    """Two passes over `steps` tokens: every routed layer run, and every one skipped.

    rate: GB/s that the dense pass reads.
    """
    config = engine.config
    both = [_times(engine, plan, depth, steps) for plan in (run, skipped)]
    plain_layers = config.num_hidden_layers - config.num_routed_layers
    layers = []
    for times, plain, routed in zip(
        both, ("plain", "plain, others skipped"), ("run", "skipped"), strict=True
    ):
        if plain_layers:
            parts = _parts(times, "", plain_layers, _shares(config, False))
            nbytes = _layer_bytes(engine, depth, None)
            layers.append(LayerTime(plain, plain_layers, parts, nbytes / rate / 1e6))
        if config.num_routed_layers:
            parts = _parts(times, "routed.", config.num_routed_layers, _shares(config, True))
            nbytes = _layer_bytes(engine, depth, routed == "skipped")
            layers.append(LayerTime(routed, config.num_routed_layers, parts, nbytes / rate / 1e6))
    head, other = ([times[name] * 1e3 for times in both] for name in ("head", "other"))
    return Breakdown(
        model,
        str(engine.dtype).removeprefix("torch."),
        engine.num_threads,
        depth,
        layers,
        (head[0], head[1]),
        (other[0], other[1]),
    )


def _times(engine: Engine, plan: Plan, depth: int, steps: int) -> dict[str, float]:
    """Seconds of a token by part; "other" has what is between passes as well."""
    case = decode_case(engine, plan, batch=1, depth=depth, steps=steps)
    case.start()
    for _ in range(STEADY):
        case.step()
    case.start()
    for _ in range(2):
        case.step()
    engine.record_times()
    for _ in range(steps):
        case.step()
    times = {name: seconds / steps for name, seconds in engine.times().items()}
    engine.record_times(False)
    return times


def _layer_bytes(engine: Engine, depth: int, skipped: bool | None) -> float:
    """Of a layer that is not routed (None), run or skipped: differences of whole tokens."""
    config, size = engine.config, torch.empty((), dtype=engine.dtype).element_size()
    layers, routed = config.num_hidden_layers, max(1, config.num_routed_layers)
    dense = bytes_per_token(config, 0, weight_bytes=size, context=depth, routers=False)
    plain = (dense - size * config.vocab_size * config.hidden_size) / layers
    if skipped is None:
        return plain
    run, one = (bytes_per_token(config, n, weight_bytes=size, context=depth) for n in (0, 1))
    return plain + (run - dense) / routed - (run - one if skipped else 0)


def _shares(config: FlexiDepthConfig, routed: bool) -> dict[str, float]:
    """How the time of the joint projection of a layer's inputs is divided: by bytes."""
    kv = 2 * config.num_key_value_heads * config.head_dim
    first = 2 * config.router_dim if routed else config.num_attention_heads * config.head_dim
    name = "router" if routed else "queries and output"
    return {name: first / (first + kv), "keys and values": kv / (first + kv)}


def _parts(
    times: dict[str, float], prefix: str, layers: int, shares: dict[str, float]
) -> dict[str, float]:
    found = {name: times[prefix + name] * 1e3 / layers for name in _ENGINE_PARTS}
    parts = dict.fromkeys(PARTS, 0.0)
    for name, share in shares.items():
        parts[name] += share * found["inputs"]
    parts["router"] += found["gate"]
    parts["queries and output"] += found["queries"] + found["output"]
    parts["attention"] += found["attention"]
    parts["feed-forward"] += found["feed_forward"]
    parts["adapter"] += found["adapter"]
    return parts


_ENGINE_PARTS = ("inputs", "gate", "queries", "attention", "output", "feed_forward", "adapter")


def table_rows(breakdowns: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Cells of a table, in microseconds, heading first; breakdowns: `Breakdown.to_dict()` of each."""
    rows = [["layer", "threads", *PARTS, "total", "by bytes"]]
    many = len({(b["model"], b["dtype"], b["depth"]) for b in breakdowns}) > 1
    for breakdown in breakdowns:
        where = f", {breakdown['model']} {breakdown['dtype']} d{breakdown['depth']}" if many else ""
        threads = str(breakdown["threads"])
        for layer in breakdown["layers"]:
            values = [layer["parts"][name] for name in PARTS]
            values += [sum(values), layer["by_bytes"]]
            cells = [f"{1e3 * value:.1f}" for value in values]
            rows.append([layer["layer"] + where, threads, *cells])
        for name, key in (("LM head", "head_ms"), ("other", "other_ms")):
            for text, value in zip(("", ", others skipped"), breakdown[key], strict=True):
                blank = [""] * len(PARTS)
                rows.append([name + text + where, threads, *blank, f"{1e3 * value:.1f}", ""])
    return rows
