"""Greedy answers beside the base model's: how many begin alike, how many never end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .points import Point
from .texts import Messages

if TYPE_CHECKING:
    from ..generation.output import GenerationOutput
    from ..llm import FlexiDepth

COMPARED = 32  # tokens of an answer


@dataclass(frozen=True)
class Answers:
    """tokens: ids of each answer, the end token included. ended: whether it ended by itself. skipped: layers
    skipped by a token of the answers in the mean, NaN where no token was decoded."""

    tokens: list[list[int]]
    ended: list[bool]
    skipped: float

    @property
    def never_ending(self) -> float:
        """Share of the answers that were cut off."""
        return 1 - sum(self.ended) / len(self.ended)

    def identical(self, other: Answers, length: int = COMPARED) -> float:
        """Share of the answers whose first `length` tokens are the other's."""
        same = [a[:length] == b[:length] for a, b in zip(self.tokens, other.tokens, strict=True)]
        return sum(same) / len(same)


def answer_prompts(
    llm: FlexiDepth, prompts: Sequence[Messages], point: Point, max_new_tokens: int
) -> Answers:
    """Greedy answers to conversations as `point` routes."""
    outputs = greedy_outputs(llm, prompts, point, max_new_tokens)
    decoded = [len(out.token_ids) - 1 for out in outputs]
    skipped = [llm.config.num_hidden_layers - out.metrics.mean_layers_used for out in outputs]
    total = sum(decoded)
    weighed = sum(n * s for n, s in zip(decoded, skipped, strict=True) if n)
    return Answers(
        [out.token_ids for out in outputs],
        [out.finish_reason != "length" for out in outputs],
        weighed / total if total else float("nan"),
    )


def greedy_outputs(
    llm: FlexiDepth,
    prompts: Sequence[Messages],
    point: Point,
    max_new_tokens: int,
    *,
    return_routing: bool = False,
) -> list[GenerationOutput]:
    """One output for each conversation."""
    outputs = llm.generate(
        list(prompts),
        max_new_tokens=max_new_tokens,
        temperature=0,
        seed=0,
        return_routing=return_routing,
        **point.arguments(),
    )
    assert isinstance(outputs, list)  # a batch gives a list
    return outputs
