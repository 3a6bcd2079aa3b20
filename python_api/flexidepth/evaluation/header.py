"""What stands at the head of an evaluation: enough to run it again and to tell two runs apart."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from flexidepth_ext import _C

from ..checkpoints import Checkpoint
from ..loading import resolve_dtype
from .data import ANSWERS, EvalData, data_digests, model_digest
from .options import EvalOptions
from .record import FORMAT


def make_identity(
    options: EvalOptions,
    checkpoint: Checkpoint,
    others: dict[str, Checkpoint],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """What the figures depend on: options, models and data by their digests, the program.

    others: further checkpoints by their names.
    """
    models = {options.model: checkpoint, **{options.also[n]: c for n, c in others.items()}}
    return {
        "options": options.identity(),
        "isa": _C.OpContext(1).isa,
        "models": {name: model_digest(c.source) for name, c in models.items()},
        "data": data_digests(options),
        "commit": machine["commit"],
        "versions": machine["versions"],
    }


def make_header(
    options: EvalOptions,
    checkpoint: Checkpoint,
    data: EvalData,
    machine: dict[str, Any],
    identity: dict[str, Any],
) -> dict[str, Any]:
    """What was measured, on what, with what, on which machine."""
    config = checkpoint.config
    return {
        "format": FORMAT,
        "model": options.model,
        "routers_trained": checkpoint.routers_trained,
        "dtype": str(resolve_dtype(options.dtype)).removeprefix("torch."),
        "num_layers": config.num_hidden_layers,
        "routing_layers": list(config.routing_layers),
        "adapter_dim": config.adapter_dim,
        "calibrated_on": data.everything.source,
        "calibration_tokens": data.everything.tokens,
        "calibrated_each": [
            {"part": part, "subject": name, "tokens": text.tokens, "source": text.source}
            for (part, name), text in data.calibration.items()
            if (part, name) != ANSWERS
        ],
        "command": _program() + " " + shlex.join(sys.argv[1:]),
        "machine": machine,
        **identity,
    }


def _program() -> str:
    """What was called: the command, or the module that evaluates as a part of its work."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if main is None or main.name in ("flexidepth.__main__", "pytest.__main__"):
        return "flexidepth"
    return f"python -m {main.name}"
