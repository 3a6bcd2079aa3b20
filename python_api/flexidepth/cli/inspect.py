"""flexidepth inspect"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import typer

from .common import command_errors, print_json, say
from .options import BaseModel, Json, Model, PreferHub

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint

_HELP = """Show what a model is made of and what a decoded token costs; no weight is read.

Example: flexidepth inspect smollm2-135m
"""
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
)
_ROUTING = ("router_dim", "adapter_dim", "router_order", "router_bias", "gate")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(inspect)


@command_errors
def inspect(
    model: Model,
    prefer_hub: PreferHub = False,
    base_model: BaseModel = None,
    as_json: Json = False,
) -> None:
    from ..checkpoints import open_checkpoint

    facts = describe(
        open_checkpoint(model, base_model=base_model, prefer_hub=prefer_hub, notify=say)
    )
    if as_json:
        print_json(facts)
    else:
        print(render(facts))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts about an opened checkpoint as plain values; bytes are those of the engine in bfloat16."""
    import torch

    from ..bench.ideal import bytes_per_token, ideal_speedup

    config = checkpoint.config
    routed = config.num_routed_layers
    trained = "trained" if checkpoint.routers_trained else "seeded, not trained"
    return {
        "source": checkpoint.source,
        "base_model": checkpoint.base,
        "base_model_type": config.base_model_type,
        "config": {name: getattr(config, name) for name in _SIZES},
        "routing": {
            "layers": list(config.routing_layers),
            "thresholds": list(config.router_thresholds),
            "routers": trained if routed else "none",
            "skip_presets": dict(config.skip_presets),
            "calibrated_layers_skipped": [p["layers_skipped"] for p in config.calibration],
            **{name: getattr(config, name) for name in _ROUTING},
        },
        "parts": _parts(config),
        "memory": {
            "weights_bfloat16": checkpoint.nbytes_estimate(torch.bfloat16),
            "weights_float32": checkpoint.nbytes_estimate(torch.float32),
            "cache_bfloat16_per_token": 4
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim,
        },
        "bytes_per_token": {
            "dense": bytes_per_token(config, 0, routers=False),
            "every_layer_run": bytes_per_token(config, 0),
            "every_routed_layer_skipped": bytes_per_token(config, routed),
            "ideal_speedup": round(ideal_speedup(config, routed), 3),
        },
        "tokenizer": _tokenizer(checkpoint),
    }


def _parts(config: Any) -> dict[str, dict[str, int]]:
    """Parameters and bytes by part; norms, biases and routers are float32, matrices bfloat16.

    Tied embeddings are stored once, as the head.
    """
    from ..checkpoints.checkpoint import expected_shapes

    parts = {name: {"parameters": 0, "bytes": 0} for name in _PARTS}
    for name, shape in expected_shapes(config).items():
        part = parts[_part_of(name, tied=config.tie_word_embeddings)]
        wide = len(shape) == 1 or ".router." in name
        part["parameters"] += prod(shape)
        part["bytes"] += prod(shape) * (4 if wide else 2)
    total = {key: sum(part[key] for part in parts.values()) for key in ("parameters", "bytes")}
    return {**parts, "total": total}


_PARTS = ("embeddings", "base_layers", "routers", "adapters", "head")


def _part_of(name: str, *, tied: bool) -> str:
    if name.startswith("lm_head."):
        return "head"
    if name.startswith("model.embed_tokens."):
        return "head" if tied else "embeddings"
    if ".router." in name:
        return "routers"
    return "adapters" if ".adapter." in name else "base_layers"


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        return None
    return {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "chat_template": getattr(tokenizer, "chat_template", None) is not None,
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    config, routing, cost = facts["config"], facts["routing"], facts["bytes_per_token"]
    tokenizer, memory = facts["tokenizer"], facts["memory"]
    elsewhere = f", from {facts['base_model']}" if facts["base_model"] else ""
    lines = [("source", facts["source"]), ("base model", facts["base_model_type"] + elsewhere)]
    lines += [(name.replace("_", " "), str(config[name])) for name in _SIZES]
    lines += [
        ("routed layers", f"{_ranges(routing['layers'])} ({len(routing['layers'])})"),
        ("routers", routing["routers"]),
        ("thresholds", ", ".join(f"{t:g}" for t in _distinct(routing["thresholds"])) or "none"),
    ]
    lines += [
        ("skip presets", _presets(routing)),
        *((name.replace("_", " "), str(routing[name])) for name in _ROUTING),
    ]
    lines += [
        (
            name.replace("_", " "),
            f"{part['parameters']:>13,} parameters {part['bytes'] / 1e6:>10.2f} MB",
        )
        for name, part in facts["parts"].items()
    ]
    lines += [
        (
            "memory",
            f"{memory['weights_bfloat16'] / 1e6:.2f} MB of weights in bfloat16, {memory['weights_float32'] / 1e6:.2f} "
            f"in float32; {memory['cache_bfloat16_per_token'] / 1e3:.2f} KB of cache a token",
        ),
        ("a dense token reads", f"{cost['dense'] / 1e6:.2f} MB (bfloat16, short context)"),
        ("every layer run", f"{cost['every_layer_run'] / 1e6:.2f} MB"),
        (
            "every routed one skipped",
            f"{cost['every_routed_layer_skipped'] / 1e6:.2f} MB, ideal speed-up "
            f"{cost['ideal_speedup']:.2f}",
        ),
        (
            "tokenizer",
            "none"
            if tokenizer is None
            else f"{tokenizer['class']}, {tokenizer['tokens']} tokens, "
            f"{'with' if tokenizer['chat_template'] else 'no'} chat template",
        ),
    ]
    return "\n".join(f"{name:26} {value}" for name, value in lines)


def _presets(routing: dict[str, Any]) -> str:
    """The dial in words: names, layers skipped a token, and how far it goes."""
    points = routing["calibrated_layers_skipped"]
    if not points:
        return "none: not calibrated" if routing["layers"] else "none"
    ascending = sorted(routing["skip_presets"].items(), key=lambda item: item[1])
    named = ", ".join(f"{name} ({target:g} layers)" for name, target in ascending) or "none"
    return f"{named}; calibrated for {points[0]:.2f} to {points[-1]:.2f} layers"


def _distinct(values: list[float]) -> list[float]:
    """One value where all are equal."""
    return values[:1] if len(set(values)) == 1 else values


def _ranges(layers: list[int]) -> str:
    """Layers as 15-29 or 3, 5, 7-9."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts) or "none"
