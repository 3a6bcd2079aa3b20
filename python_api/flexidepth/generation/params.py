"""Arguments of a generation: names and meaning of transformers, checked once."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..errors import ValueOutOfRangeError

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
StoppingCriterion = Callable[..., Any]


@dataclass
class GenerationParams:
    """Sampling and stopping of a generation.

    max_new_tokens: at most this many. do_sample: None follows temperature. temperature: 0 or None =
    greedy. top_k: 0 = off. top_p: 1 = off. min_p: 0 = off. repetition_penalty: 1 = off (scores of tokens
    already present are divided by it when positive, multiplied when negative). eos_token_id: None = the
    model's. stop_strings: text that ends the answer and is not part of it. seed: None = random.
    num_return_sequences: answers per prompt. logits_processor: callables (input_ids [1, T], scores [1, V])
    -> scores, before temperature. stopping_criteria: callables (input_ids [1, T], scores [1, V]) -> truthy to
    stop. logprobs: how many of the most likely tokens to report at each step, None = no log-probabilities.
    skip_special_tokens: leave control tokens out of the text.
    """

    max_new_tokens: int = 256
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] = ()
    seed: int | None = None
    num_return_sequences: int = 1
    logits_processor: Sequence[LogitsProcessor] = ()
    stopping_criteria: Sequence[StoppingCriterion] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_return_sequences"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        if self.temperature is not None:
            _check(
                "temperature",
                self.temperature,
                0 <= self.temperature < math.inf,
                "0 (greedy) or more",
            )
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a value in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "a value in [0, 1]")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            0 < self.repetition_penalty < math.inf,
            "above 0",
        )
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, self.logprobs >= 0, "0 or more")
        if isinstance(self.stop_strings, str):
            self.stop_strings = (self.stop_strings,)
        _check(
            "stop_strings", self.stop_strings, all(self.stop_strings), "texts that are not empty"
        )
        if self.seed is None:
            self.seed = int.from_bytes(os.urandom(7), "little")
        if self.do_sample is None:
            self.do_sample = bool(self.temperature)

    @property
    def effective_temperature(self) -> float:
        """0 for greedy, else the temperature (1 where none was given)."""
        if not self.do_sample:
            return 0.0
        return 1.0 if self.temperature is None else self.temperature


def make_params(arguments: dict[str, Any]) -> GenerationParams:
    """GenerationParams from keyword arguments; TypeError with a suggestion for an unknown one."""
    known = [field.name for field in fields(GenerationParams)]
    for name in arguments:
        if name not in known:
            close = difflib.get_close_matches(
                name, [*known, "force_routing", "skip_threshold", "return_routing"], n=1
            )
            hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
            raise TypeError(f"generate: unknown argument {name!r}{hint}")
    return GenerationParams(**arguments)


def _check(name: str, value: Any, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueOutOfRangeError(f"generate: {name} is {value!r}; wanted {wanted}")
