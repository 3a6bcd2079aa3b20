"""The one table between this package's tensor names and those of the released checkpoint (`ddllama`).

In the released files the adapter's `down_proj` is W_up and its `up_proj` is W_out, despite their names.
"""

from __future__ import annotations

from typing import Any

# ours -> released, inside "model.layers.N."
_TABLE = {
    "router.enc.weight": "router.router_enc.weight",
    "router.norm.weight": "router.router_norm.weight",
    "router.dec.weight": "router.router_dec.weight",
    "router.head.weight": "router.router_head.weight",
    "router.head.bias": "router.router_head.bias",
    "adapter.gate_proj.weight": "router_proj.gate_proj.weight",
    "adapter.up_proj.weight": "router_proj.down_proj.weight",
    "adapter.down_proj.weight": "router_proj.up_proj.weight",
}
_INVERSE = {released: ours for ours, released in _TABLE.items()}


def to_released(name: str) -> str:
    """Released name of a canonical name; names outside router and adapter are the same."""
    return _rename(name, _TABLE)


def from_released(name: str) -> str:
    """Canonical name of a released name."""
    return _rename(name, _INVERSE)


def _rename(name: str, table: dict[str, str]) -> str:
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in table:
        return ".".join((*parts[:3], table[parts[3]]))
    return name


def routing_from_released(config: dict[str, Any]) -> dict[str, Any]:
    """Routing arguments of FlexiDepthConfig from a `ddllama` config.json."""
    return {
        "routing_layers": config["routing_layers"],
        "router_reduction_factor": config.get("router_reduction_factor", 16),
        "adapter_reduction_factor": config.get("proj_reduction_factor", 16),
        "router_order": "norm_tanh",
        "gate": "multiplier",
    }


def routing_to_released(config: Any) -> dict[str, Any]:
    """Keys that a `ddllama` config.json adds to those of Llama."""
    return {
        "model_type": "ddllama",
        "routing_layers": list(config.routing_layers),
        "router_reduction_factor": config.router_reduction_factor,
        "proj_reduction_factor": config.adapter_reduction_factor,
    }
