"""Quality against layers skipped, on the fast engine.

    from pathlib import Path
    from flexidepth.evaluation import EvalOptions, evaluate

    result = evaluate(EvalOptions("my-model", texts={"prose": Path("prose.jsonl")}, skipped=[0, 2, 4]))
    for row in result.rows:
        print(row.method, row.skipped, row.ratio)

Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import EvalOptions
    from .run import EvalResult, evaluate

_EXPORTS = {"EvalOptions": "options", "EvalResult": "run", "evaluate": "run"}

__all__ = ["EvalOptions", "EvalResult", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
