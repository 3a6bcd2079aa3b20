"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(content: Any, *, indent: int | None) -> str:
    """`content` as JSON; what is not a number (NaN, infinities) becomes null, for which JSON has a word."""
    return json.dumps(_finite(content), ensure_ascii=False, indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
