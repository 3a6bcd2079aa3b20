"""Layers used by kind of task: copying asks for other layers than arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ValueOutOfRangeError
from .answers import greedy_outputs
from .points import Point
from .texts import Messages

if TYPE_CHECKING:
    from ..llm import FlexiDepth

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class KindUse:
    """Layers used in the tasks of a kind.

    prompt_layers, answer_layers: layers that a token used in the mean (of all layers; NaN without a decoded
    token). answer_stderr: standard error of answer_layers, each answer's tokens taken as one draw (NaN of fewer than
    two answers). run_rates: share of the answers' tokens that ran each of `routing_layers`, [] without one.
    prompt_tokens, answer_tokens: tokens counted.
    """

    kind: str
    prompt_layers: float
    answer_layers: float
    answer_stderr: float
    run_rates: list[float]
    routing_layers: list[int]
    prompt_tokens: int
    answer_tokens: int


def measure_kind(llm: FlexiDepth, kind: str, prompts: Sequence[Messages], point: Point) -> KindUse:
    """Answer the prompts of a kind greedily as `point` routes and count the layers."""
    outputs = greedy_outputs(llm, prompts, point, MAX_NEW_TOKENS, return_routing=True)
    reports = [out.routing for out in outputs if out.routing is not None]
    prompt = torch.cat([report.ran[: report.prompt_length] for report in reports])
    answers = [report.ran[report.prompt_length :] for report in reports]
    answer = torch.cat(answers)
    always = llm.config.num_hidden_layers - llm.config.num_routed_layers
    return KindUse(
        kind,
        always + _mean_layers(prompt),
        always + _mean_layers(answer),
        _standard_error([ran.sum(1).double() for ran in answers if len(ran)]),
        answer.float().mean(0).tolist() if len(answer) else [],
        list(llm.config.routing_layers),
        len(prompt),
        len(answer),
    )


def _mean_layers(ran: Tensor) -> float:
    """ran: uint8 [tokens, routed layers]."""
    return float(ran.sum(1).double().mean()) if len(ran) else float("nan")


def _standard_error(answers: Sequence[Tensor]) -> float:
    """Of the mean over all tokens (layers of each token, for each answer): a ratio of two sums over answers."""
    if len(answers) < 2:
        return float("nan")
    mean = torch.cat(list(answers)).mean()
    off = torch.stack([(layers - mean).sum() for layers in answers])
    count = len(answers)
    tokens = sum(map(len, answers))
    return float((off.square().sum() * count / (count - 1)).sqrt() / tokens)


def made_prompts(
    per_kind: int, seed: int, documents: Sequence[str], notify: Callable[[str], None]
) -> dict[str, list[Messages]]:
    """Prompts of made-up tasks on which nothing trains, {kind: [messages]}.

    documents: texts to summarise and to continue. A kind for which they are too few is said and left out.
    """
    from ..training.made_tasks import FROM_TEXTS, KINDS, make_tasks

    made = {}
    for kind in KINDS:
        texts = list(documents) if kind in FROM_TEXTS else None
        try:
            tasks = make_tasks(kind, per_kind, seed, split="eval", texts=texts)
        except ValueOutOfRangeError as error:
            notify(f"{error}; that kind is left out")
            continue
        made[kind] = [[{"role": "user", "content": task["prompt"]}] for task in tasks]
    return made
