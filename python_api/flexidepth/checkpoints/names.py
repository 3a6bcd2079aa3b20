"""The one table between this package's tensor names and those of the released checkpoint (`ddllama`).

In the released files the adapter's `down_proj` is W_up and its `up_proj` is W_out, despite their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedError, ValueOutOfRangeError

if TYPE_CHECKING:
    from ..config import FlexiDepthConfig

# ours -> released, inside "model.layers.N."
_TENSORS = {
    "router.enc.weight": "router.router_enc.weight",
    "router.norm.weight": "router.router_norm.weight",
    "router.dec.weight": "router.router_dec.weight",
    "router.head.weight": "router.router_head.weight",
    "adapter.gate_proj.weight": "router_proj.gate_proj.weight",
    "adapter.up_proj.weight": "router_proj.down_proj.weight",
    "adapter.down_proj.weight": "router_proj.up_proj.weight",
}
_TENSORS_INVERSE = {released: ours for ours, released in _TENSORS.items()}

# ours -> released, in config.json
_KEYS = {
    "routing_layers": "routing_layers",
    "router_reduction_factor": "router_reduction_factor",
    "adapter_reduction_factor": "proj_reduction_factor",
}
# What the released model code fixes and its config therefore does not say.
_FIXED = {
    "base_model_type": "llama",
    "router_order": "norm_tanh",
    "gate": "multiplier",
    "router_bias": False,
    "ablations": [],
}
_FIXED_THRESHOLD = 0.5


def to_released(name: str) -> str:
    """Released name of a canonical name; names outside router and adapter are the same."""
    return _rename(name, _TENSORS)


def from_released(name: str) -> str:
    """Canonical name of a released name."""
    return _rename(name, _TENSORS_INVERSE)


def _rename(name: str, table: Mapping[str, str]) -> str:
    parts = name.split(".", 3)
    if len(parts) == 4 and parts[:2] == ["model", "layers"] and parts[3] in table:
        return ".".join((*parts[:3], table[parts[3]]))
    return name


def routing_from_released(where: object, content: Mapping[str, Any]) -> dict[str, Any]:
    """Routing arguments of FlexiDepthConfig from a `ddllama` config.json; `where` names it in errors."""
    if content.get("mlp_bias"):
        raise UnsupportedError(
            f"{where}: mlp_bias gives the adapters of a ddllama checkpoint biases; not implemented"
        )
    if "routing_layers" not in content:
        raise CheckpointError(
            f"{where}: no routing_layers; a ddllama config names the layers with a router"
        )
    routing = {ours: content[released] for ours, released in _KEYS.items() if released in content}
    return {**routing, **{key: value for key, value in _FIXED.items() if key != "base_model_type"}}


def routing_to_released(config: FlexiDepthConfig) -> dict[str, Any]:
    """Keys that a `ddllama` config.json adds to those of Llama.

    Raises:
        ValueOutOfRangeError: a model the released code would run differently.
    """
    wrong = [
        f"{key} {getattr(config, key)!r}"
        for key, value in _FIXED.items()
        if getattr(config, key) != value
    ]
    if any(tau != _FIXED_THRESHOLD for tau in config.router_thresholds):
        wrong.append(f"router_thresholds {config.router_thresholds}")
    if wrong:
        fixed = ", ".join(f"{key} {value!r}" for key, value in _FIXED.items())
        raise ValueOutOfRangeError(
            f"save: this model has {', '.join(wrong)}; the ddllama layout means {fixed} and thresholds of "
            f"{_FIXED_THRESHOLD}; use the flexidepth layout"
        )
    return {released: getattr(config, ours) for ours, released in _KEYS.items()}
