"""The routing arguments a user may give when opening a model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ..config import FlexiDepthConfig
from ..errors import ValueOutOfRangeError

_SHAPING = (
    "routing_layers",
    "router_reduction_factor",
    "adapter_reduction_factor",
    "router_bias",
    "ablations",
)
_COMPUTING = ("router_order", "gate")
_FREE = (*_COMPUTING, "router_thresholds")


def check_routing(routing: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments as a dict; ValueOutOfRangeError for a key that is none of them."""
    allowed = (*_SHAPING, *_FREE)
    for key in routing or {}:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueOutOfRangeError(
                f"routing: no argument {key!r}; there are {', '.join(allowed)}{hint}"
            )
    return dict(routing or {})


def shapes_routers(routing: Mapping[str, Any]) -> bool:
    """Whether these arguments ask for routers of a certain place or size, which stored ones may not have."""
    return any(routing.get(key) is not None for key in _SHAPING)


def override_stored(
    where: object, stored: FlexiDepthConfig, routing: Mapping[str, Any]
) -> FlexiDepthConfig:
    """`stored` with other routing; ValueOutOfRangeError where the stored routers would not fit any more."""
    for key in _SHAPING:
        have, asked = getattr(stored, key), routing.get(key)
        if asked is not None and (sorted(asked) if key == "routing_layers" else asked) != have:
            raise ValueOutOfRangeError(
                f"routing: {key} {asked!r} for {where}, whose routers were made with {have!r}; only "
                f"{', '.join(_FREE)} can be changed without making them anew from the base model"
            )
    changed = {key: value for key, value in routing.items() if key in _FREE}
    if any(changed.get(key, getattr(stored, key)) != getattr(stored, key) for key in _COMPUTING):
        # Another computation skips other layers: what was measured holds no longer.
        changed = {"calibration": [], "skip_presets": {}, **changed}
    return FlexiDepthConfig.from_dict({**stored.to_dict(), **changed}) if changed else stored
