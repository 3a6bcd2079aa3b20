"""Adaptive layer skipping in language models that is really faster.

    from flexidepth import FlexiDepth

    with FlexiDepth.from_pretrained("smollm2-135m") as llm:
        out = llm.generate("Hello", max_new_tokens=64, seed=0, return_routing=True)
        print(out.text, out.metrics.decode_tps, out.routing.layers_used)

Names are loaded on first use, so that `import flexidepth` costs nothing. Importing `flexidepth.modeling`
(which the names FlexiDepthForCausalLM and FlexiDepthModel do) registers the model with transformers' Auto
classes.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import (
        convert,
        load_trainable,
        merge,
        open_checkpoint,
        save_checkpoint,
        save_routing,
    )
    from .config import FlexiDepthConfig
    from .generation.output import GenerationOutput
    from .llm import FlexiDepth, StreamChunk
    from .modeling import FlexiDepthForCausalLM, FlexiDepthModel
    from .routing import RoutingReport

__version__ = "0.1.0"

_EXPORTS = {
    "FlexiDepth": "llm",
    "StreamChunk": "llm",
    "GenerationOutput": "generation.output",
    "RoutingReport": "routing",
    "FlexiDepthConfig": "config",
    "FlexiDepthModel": "modeling",
    "FlexiDepthForCausalLM": "modeling",
    "convert": "checkpoints",
    "load_trainable": "checkpoints",
    "merge": "checkpoints",
    "open_checkpoint": "checkpoints",
    "save_checkpoint": "checkpoints",
    "save_routing": "checkpoints",
}

__all__ = [
    "FlexiDepth",
    "FlexiDepthConfig",
    "FlexiDepthForCausalLM",
    "FlexiDepthModel",
    "GenerationOutput",
    "RoutingReport",
    "StreamChunk",
    "convert",
    "load_trainable",
    "merge",
    "open_checkpoint",
    "save_checkpoint",
    "save_routing",
]


def _import_extension() -> None:
    """Import the flexidepth_ext that was installed beside this package.

    Python started in a checkout looks there first, where flexidepth_ext is not built unless the checkout itself is what
    was installed.
    """
    name = "flexidepth_ext"
    beside = Path(__file__).parent.parent / name
    if name in sys.modules or not (beside / "__init__.py").exists():
        return
    spec = spec_from_file_location(
        name, beside / "__init__.py", submodule_search_locations=[str(beside)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # half made: whoever imports it next is to meet the error, too
        raise


_import_extension()


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
