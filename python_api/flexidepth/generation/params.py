"""Arguments of a generation: names and meaning of transformers, checked once."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..arguments import as_number, as_whole, seed_number, whole_number
from ..errors import ValueOutOfRangeError

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
StoppingCriterion = Callable[..., Any]

_OFF: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop_strings": (),
    "logits_processor": (),
    "stopping_criteria": (),
}


@dataclass
class GenerationParams:
    """Sampling and stopping of a generation. None turns off what has an "off" below.

    max_new_tokens: at most this many. do_sample: None follows temperature. temperature: 0 or None =
    greedy. top_k: 0 = off. top_p: 1 = off. min_p: 0 = off. repetition_penalty: 1 = off (scores of tokens
    already present are divided by it when positive, multiplied when negative). eos_token_id: a token or a
    list of them; None = the model's, -1 or an empty list = none. stop_strings: a text or a list of texts that
    end the answer and are not part of it; empty = off. seed: None = random. num_return_sequences: answers per
    prompt. logits_processor: a callable (input_ids [1, T], scores [1, V]) -> scores [1, V] or a list of them,
    before temperature; empty = off. stopping_criteria: a callable (input_ids [1, T], scores [1, V]) ->
    truthy to stop, or a list of them; empty = off. logprobs: how many of the most likely tokens to report
    at each step, None = no log-probabilities. skip_special_tokens: leave control tokens out of the text.

    Raises:
        ValueOutOfRangeError: a value of the wrong type or outside its range.
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
        for name, off in _OFF.items():
            if getattr(self, name) is None:
                setattr(self, name, off)
        self._check_numbers()
        self._check_switches()
        for name in ("logits_processor", "stopping_criteria"):
            setattr(self, name, _callables(name, getattr(self, name)))
        if isinstance(self.stop_strings, str):
            self.stop_strings = (self.stop_strings,)
        stops = self.stop_strings
        ok = isinstance(stops, Sequence) and all(isinstance(s, str) and s for s in stops)
        _check("stop_strings", stops, ok, "texts that are not empty")
        if self.eos_token_id is not None:
            self.eos_token_id = _end_tokens(self.eos_token_id)
        if self.do_sample is None:
            self.do_sample = bool(self.temperature)

    def _check_numbers(self) -> None:
        for name, low in (("max_new_tokens", 1), ("num_return_sequences", 1), ("top_k", 0)):
            setattr(self, name, whole_number(f"generate: {name}", getattr(self, name), low))
        if self.logprobs is not None:
            self.logprobs = whole_number("generate: logprobs", self.logprobs, 0)
        if self.seed is None:
            self.seed = int.from_bytes(os.urandom(7), "little")
        self.seed = seed_number("generate: seed", self.seed)
        if self.temperature is not None:
            self.temperature = _number(
                "temperature", self.temperature, lambda t: 0 <= t < math.inf, "0 (greedy) or more"
            )
        self.top_p = _number("top_p", self.top_p, lambda p: 0 < p <= 1, "a value in (0, 1]")
        self.min_p = _number("min_p", self.min_p, lambda p: 0 <= p <= 1, "a value in [0, 1]")
        self.repetition_penalty = _number(
            "repetition_penalty", self.repetition_penalty, lambda r: 0 < r < math.inf, "above 0"
        )

    def _check_switches(self) -> None:
        _check(
            "do_sample",
            self.do_sample,
            self.do_sample in (None, True, False),
            "True, False or None",
        )
        skip = self.skip_special_tokens
        _check("skip_special_tokens", skip, isinstance(skip, bool), "True or False")

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueOutOfRangeError where an argument asks for tokens that a vocabulary of `size` lacks."""
        if self.logprobs is not None:
            whole_number(
                "generate: logprobs", self.logprobs, 0, size, hint=", the size of the vocabulary"
            )
        for token in _end_tokens(self.eos_token_id or ()):
            _check(
                "eos_token_id", token, token < size, f"a token of the vocabulary, 0 to {size - 1}"
            )

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


def _number(name: str, value: Any, allowed: Callable[[float], bool], wanted: str) -> float:
    number = as_number(value)
    if number is None or not allowed(number):
        raise ValueOutOfRangeError(f"generate: {name} is {value!r}; wanted a number, {wanted}")
    return number


def _end_tokens(value: Any) -> tuple[int, ...]:
    """Token ids that end an answer; -1 alone stands for none."""
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if as_whole(value[0] if several and len(value) == 1 else value) == -1:
        return ()
    ids = []
    for token in value if several else [value]:
        number = as_whole(token)
        if number is None or number < 0:
            raise ValueOutOfRangeError(
                f"generate: eos_token_id is {value!r}; wanted a token id, a list of them, or -1 for none"
            )
        ids.append(number)
    return tuple(ids)


def _callables(name: str, value: Any) -> tuple[Any, ...]:
    """One callable or several as a tuple. The lists of transformers are callable too: lists come first."""
    several = value if isinstance(value, Sequence) else (value,)
    for item in several:
        _check(name, item, callable(item), "a callable or a list of them")
    return tuple(several)
