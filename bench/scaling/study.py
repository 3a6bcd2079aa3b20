"""The whole study as plain values: everything that the page, the tables and the figures show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from flexidepth.config import FlexiDepthConfig

from ..ideal import flops_of_prompt
from .costs import (
    Layers,
    dense_bytes,
    head_bytes,
    layer_bytes,
    resident_bytes,
    step_bytes,
    token_bytes,
)
from .devices import FLOP_SHARE, H100, STUDIED, Device, Latency
from .measured import Measured
from .model import Machine, break_even, dense_seconds, prompt_seconds, token_seconds
from .points import pooled
from .precision import BF16, INT4, Precision
from .precision import STUDIED as PRECISIONS
from .published import PUBLISHED
from .recorded import Recording
from .shapes import STUDIED as MODELS
from .shapes import shape_config
from .union import (
    independent_layers,
    recorded_layers,
    simulate_independent,
    simulate_recorded,
    skip_rates,
)

FORMAT = "flexidepth-scaling-1"
CONTEXT = 128  # tokens in the cache, as in the committed measurements
CONTEXTS = (128, 8192, 32768, 131072)
BATCHES = (1, 2, 4, 8)
PROMPT = 512
DRAWS = 20_000  # of each simulation
SEED = 0
# The ends of what is plausible, for how much the answer depends on the assumptions.
_SHARES, _PHASES_US = (0.7, 0.95), (1.0, 4.0)
_SHIPPED_ADAPTER = 8  # the recorded model's adapters are ffn/8


def make_study(measured: Measured, recording: Recording) -> dict[str, Any]:
    """measured: see `read_measured`. recording: decisions of a model of 30 layers, for the batches."""
    return {
        "format": FORMAT,
        "context": CONTEXT,
        "prompt": PROMPT,
        "draws": DRAWS,
        "seed": SEED,
        "flop_share": FLOP_SHARE,
        "devices": [asdict(device) for device in STUDIED],
        "models": [_model(name) for name in MODELS],
        "measured": {
            "series": [one.to_dict() for one in measured.series],
            "refused": [one.to_dict() for one in measured.refused],
            "pooled": {
                kind: {name: e.to_dict() for name, e in pooled(measured.series, kind).items()}
                for kind in ("decode", "prompt")
            },
        },
        "published": [one.compare() for one in PUBLISHED],
        "decode": [
            _decode(device, name, precision)
            for device, name, precision in itertools.product(STUDIED, MODELS, PRECISIONS)
        ],
        "assumptions": [_assumptions(name) for name in MODELS],
        "contexts": [
            _context(name, precision, context)
            for name, precision, context in itertools.product(
                ("llama-3-8b", "llama-3-70b"), (BF16, INT4), CONTEXTS
            )
        ],
        "prompts": [_prompt(name, share) for name in MODELS for share in (0.25, 0.5, 1.0)],
        "recording": {
            "model": recording.model,
            "command": recording.command,
            "levels": {level: _level(recording, level) for level in recording.levels},
        },
        "batches": [
            row
            for level in recording.levels
            for rows in BATCHES
            for row in _batch(recording, level, rows)
        ],
    }


def _model(name: str) -> dict[str, Any]:
    """Megabytes in bf16 of a layer by path, of all routers and of the head; gigabytes of a dense token and the head's
    share of them by precision."""
    config = shape_config(name)
    layer = layer_bytes(config, BF16)
    routers = token_bytes(config, BF16, 0) - dense_bytes(config, BF16)
    return {
        "model": name,
        "layers": config.num_hidden_layers,
        "routed": config.num_routed_layers,
        "full_layer_mb": (layer.always + layer.runs) / 1e6,
        "skip_path_mb": (layer.always + layer.skips) / 1e6,
        "routers_mb": routers / 1e6,
        "head_mb": head_bytes(config, BF16) / 1e6,
        "dense_gb": {p.name: dense_bytes(config, p) / 1e9 for p in PRECISIONS},
        "head_share": {p.name: head_bytes(config, p) / dense_bytes(config, p) for p in PRECISIONS},
    }


def _decode(device: Device, name: str, precision: Precision) -> dict[str, Any]:
    """Speed-up over dense at every number of layers; without times where the model does not fit."""
    config = shape_config(name)
    resident = resident_bytes(config, precision, context=CONTEXT) / 1e9
    made: dict[str, Any] = {
        "device": device.name,
        "model": name,
        "precision": precision.name,
        "resident_gb": resident,
        "fits": resident <= device.memory,
    }
    if not made["fits"]:
        return made
    machine = Machine.of(device)
    dense = dense_seconds(machine, config, precision, context=CONTEXT)
    numbers = range(config.num_routed_layers + 1)
    dense_read = dense_bytes(config, precision, context=CONTEXT)
    return {
        **made,
        "dense_ms": dense * 1e3,
        "waiting_share": machine.waiting(config, None) / dense,
        "break_even": break_even(machine, config, precision, context=CONTEXT),
        "speedup": [
            dense / token_seconds(machine, config, precision, n, context=CONTEXT) for n in numbers
        ],
        "ideal": [dense_read / token_bytes(config, precision, n, context=CONTEXT) for n in numbers],
    }


def _assumptions(name: str) -> dict[str, Any]:
    """Speed-up on an H100 in bf16 with half of the routed layers skipped: lowest and highest over the plausible
    shares and latencies."""
    config = shape_config(name)
    skipped = config.num_routed_layers / 2
    found = []
    for share, busy in itertools.product(_SHARES, _PHASES_US):
        latency = Latency(busy, H100.latency.idle_us)
        machine = replace(Machine.of(H100), share=share, latency=latency)
        dense = dense_seconds(machine, config, BF16, context=CONTEXT)
        found.append(dense / token_seconds(machine, config, BF16, skipped, context=CONTEXT))
    return {
        "model": name,
        "shares": _SHARES,
        "phases_us": _PHASES_US,
        "lowest": min(found),
        "highest": max(found),
    }


def _context(name: str, precision: Precision, context: int) -> dict[str, Any]:
    """Ideal speed-up by bytes with half of the routed layers skipped."""
    config = shape_config(name)
    dense = dense_bytes(config, precision, context=context)
    return {
        "model": name,
        "precision": precision.name,
        "context": context,
        "cache_share": 1 - dense_bytes(config, precision) / dense,
        "resident_gb": resident_bytes(config, precision, context=context) / 1e9,
        "ideal": dense
        / token_bytes(config, precision, config.num_routed_layers / 2, context=context),
    }


def _prompt(name: str, share: float) -> dict[str, Any]:
    """Ratio of arithmetic, and the speed-up on each device in bf16 (None where the model does not fit)."""
    config = shape_config(name)
    dense = flops_of_prompt(config, PROMPT, 0.0, routers=False)
    speedups = {}
    for device in STUDIED:
        fits = resident_bytes(config, BF16, context=PROMPT) / 1e9 <= device.memory
        speedups[device.name] = (
            prompt_seconds(device, config, BF16, PROMPT, None)
            / prompt_seconds(device, config, BF16, PROMPT, share)
            if fits
            else None
        )
    return {
        "model": name,
        "share": share,
        "ideal": dense / flops_of_prompt(config, PROMPT, share),
        "speedup": speedups,
    }


def _level(recording: Recording, level: str) -> dict[str, Any]:
    """What was recorded; shares of decoded tokens, every sequence counted alike."""
    masks = _masks(recording, level)
    rates = skip_rates(masks)
    return {
        "sequences": len(masks),
        "decoded_tokens": sum(map(len, masks)),
        "skipped": float(rates.sum()),
        "skip_rates": rates.tolist(),
    }


def _masks(recording: Recording, level: str) -> list[Any]:
    return [one.decoded for one in recording.levels[level] if len(one.decoded)]


def _batch(recording: Recording, level: str, rows: int) -> list[dict[str, Any]]:
    """Layers that a batch needs and the ideal speed-ups: rows that skip every layer alike and independently, rows
    that skip each layer as often as recorded and independently, and the recorded rows."""
    masks = _masks(recording, level)
    rates = skip_rates(masks)
    alike = np.full_like(rates, rates.mean())
    closed = {
        "alike": independent_layers(alike.tolist(), rows),
        "by layer": independent_layers(rates.tolist(), rows),
        "recorded": recorded_layers(masks, rows),
    }
    simulated = {
        "alike": simulate_independent(alike.tolist(), rows, DRAWS, SEED),
        "by layer": simulate_independent(rates.tolist(), rows, DRAWS, SEED),
        "recorded": simulate_recorded(masks, rows, DRAWS, SEED),
    }
    return [
        {
            "level": level,
            "rows": rows,
            "routing": name,
            "running": layers.running,
            "simulated": float(simulated[name][:, 0].mean()),
            "standard_error": float(simulated[name][:, 0].std(ddof=1) / DRAWS**0.5),
            "ideal": {
                model: _batch_ideal(config, layers, len(rates))
                for model, config in _batch_models().items()
            },
        }
        for name, layers in closed.items()
    ]


def _batch_models() -> dict[str, FlexiDepthConfig]:
    """The recorded model as it is shipped, and a larger one that would route as it does."""
    return {
        "smollm2-135m": shape_config("smollm2-135m", _SHIPPED_ADAPTER),
        "llama-3-8b": shape_config("llama-3-8b"),
    }


def _batch_ideal(config: FlexiDepthConfig, layers: Layers, routed: int) -> float:
    """By bytes in bf16. Shares of the recorded model's routed layers become those of this model's."""
    scale = config.num_routed_layers / routed
    own = Layers(
        layers.rows, layers.running * scale, layers.skipping * scale, layers.attending * scale
    )
    dense = dense_bytes(config, BF16, rows=layers.rows, context=CONTEXT)
    return dense / step_bytes(config, BF16, own, context=CONTEXT)


def half(speedups: Sequence[float]) -> float:
    """The value at half of the routed layers, of a list by numbers of layers from 0 on."""
    middle = (len(speedups) - 1) / 2
    low = int(middle)
    return speedups[low] + (middle - low) * (
        speedups[min(low + 1, len(speedups) - 1)] - speedups[low]
    )
