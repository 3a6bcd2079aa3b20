"""What to measure, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arguments import as_number, whole_number
from ..config import FlexiDepthConfig
from ..errors import ValueOutOfRangeError
from .points import BASE, METHODS

_LEAST = {
    "tokens": 2,
    "window": 2,
    "calibration_tokens": 2,
    "limit": 1,
    "answers": 0,
    "max_new_tokens": 1,
    "per_kind": 0,
}


@dataclass(frozen=True)
class EvalOptions:
    """What to measure.

    model: as for `FlexiDepth.from_pretrained`; with its layers forced to run it is the base model that all is
    compared with. texts: {name: jsonl file} of held-out texts. tasks: a jsonl file of multiple-choice
    questions, or a directory of them. skipped: mean layers to skip. methods: of METHODS. also: {name: model} of
    further checkpoints of the same base model. calibration: jsonl file of text on which block
    influence and the thresholds of greedy answers and kinds of task are found; None = what all held-out files hold
    behind the measured part. Thresholds of a set of texts come from what its own file holds there, those of a task from
    its questions. tokens: most of each set of texts. window: tokens of a window. calibration_tokens: most tokens of
    each calibration. limit: questions of a task. answers: greedy answers to prompts of the conversations among the
    texts, 0 = none. max_new_tokens: of an answer. per_kind: made-up tasks of each kind whose layers are counted,
    0 = none. kinds_skipped: mean layers skipped while they are.

    Raises:
        ValueOutOfRangeError: a value that cannot be measured; what depends on the model is for `check_fits`.
    """

    model: str
    texts: Mapping[str, Path] = field(default_factory=dict)
    tasks: Path | None = None
    skipped: Sequence[float] = (0, 1, 2, 3, 4, 6, 8)
    methods: Sequence[str] = METHODS
    also: Mapping[str, str] = field(default_factory=dict)
    calibration: Path | None = None
    tokens: int = 8192
    window: int = 1024
    calibration_tokens: int = 3072
    limit: int = 200
    answers: int = 16
    max_new_tokens: int = 256
    per_kind: int = 8
    kinds_skipped: float = 4
    dtype: str = "auto"
    num_threads: int | None = None
    prefer_hub: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            whole_number(f"eval: {name}", getattr(self, name), least)
        numbers = [as_number(value) for value in (*self.skipped, self.kinds_skipped)]
        if not self.skipped or any(n is None or not 0 <= n < math.inf for n in numbers):
            raise ValueOutOfRangeError(
                f"eval: skipped {list(self.skipped)}, kinds_skipped {self.kinds_skipped!r}; wanted numbers of "
                "layers from 0 on"
            )
        if len(set(numbers[:-1])) < len(self.skipped):
            raise ValueOutOfRangeError(
                f"eval: skipped {list(self.skipped)}; wanted each number once"
            )
        if wrong := [method for method in self.methods if method not in METHODS]:
            raise ValueOutOfRangeError(
                f"eval: methods {wrong}; wanted some of {', '.join(METHODS)}"
            )
        if wrong := [name for name in self.also if name in (*METHODS, BASE) or not name]:
            raise ValueOutOfRangeError(
                f"eval: a further checkpoint is named {wrong[0]!r}; that name is taken; choose another"
            )
        if not self.texts and self.tasks is None:
            raise ValueOutOfRangeError(
                "eval: neither texts nor tasks were given; that leaves nothing to measure; give one of them"
            )
        if not self.texts and self.calibration is None:
            raise ValueOutOfRangeError(
                "eval: there are tasks and no text to find thresholds on; give texts, or a calibration file"
            )

    def check_fits(self, config: FlexiDepthConfig) -> None:
        """ValueOutOfRangeError where the model has too few layers or positions, or ablations."""
        if config.ablations:
            raise ValueOutOfRangeError(
                f"eval: {self.model} has the ablations {', '.join(config.ablations)}; evaluate a whole model and give "
                "this one as a further checkpoint (also)"
            )
        routed = config.num_routed_layers
        if wrong := [n for n in self.skipped if n > routed]:
            raise ValueOutOfRangeError(
                f"eval: cannot skip {wrong} layers; this model routes {routed}; wanted 0 to {routed}"
            )
        limit = config.max_position_embeddings
        if self.window > limit:
            raise ValueOutOfRangeError(
                f"eval: window is {self.window} tokens; this model has {limit} positions; lower it"
            )

    def identity(self) -> dict[str, Any]:
        """What the figures depend on, as plain values: not the threads."""
        return {
            "model": self.model,
            "texts": {name: str(path) for name, path in self.texts.items()},
            "tasks": None if self.tasks is None else str(self.tasks),
            "skipped": [float(n) for n in self.skipped],
            "methods": list(self.methods),
            "also": {name: str(model) for name, model in self.also.items()},
            "calibration": None if self.calibration is None else str(self.calibration),
            **{name: getattr(self, name) for name in _LEAST},
            "kinds_skipped": float(self.kinds_skipped),
            "dtype": self.dtype,
            "seed": self.seed,
        }
