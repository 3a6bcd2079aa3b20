"""Greedy answers beside the base model's, and layers by kind of task."""

from __future__ import annotations

import math
import statistics

import pytest

from flexidepth import FlexiDepth
from flexidepth.evaluation.answers import Answers, answer_prompts
from flexidepth.evaluation.kinds import made_prompts, measure_kind
from flexidepth.evaluation.points import Point, base_point

from .conftest import sentence

PROMPTS = [[{"role": "user", "content": text}] for text in ("the cat", "a mat at noon", "sat")]


def test_answers_are_greedy(llm: FlexiDepth) -> None:
    point = Point("flexidepth", 1, thresholds=[0.5, 0.5, 0.5])
    answers = answer_prompts(llm, PROMPTS, point, 12)
    outputs = [llm.generate(p, max_new_tokens=12, temperature=0) for p in PROMPTS]
    assert answers.tokens == [out.token_ids for out in outputs]  # type: ignore[union-attr]
    assert answers.ended == [out.finish_reason == "eos" for out in outputs]  # type: ignore[union-attr]
    used = [out.metrics.mean_layers_used for out in outputs]  # type: ignore[union-attr]
    assert answers.skipped == pytest.approx(4 - sum(used) / 3)
    base = answer_prompts(llm, PROMPTS, base_point(), 12)
    assert base.skipped == 0 and base.tokens != answers.tokens


def test_answers_of_one_token_have_no_layers(llm: FlexiDepth) -> None:
    assert math.isnan(answer_prompts(llm, PROMPTS, base_point(), 1).skipped)


def test_comparison_of_answers() -> None:
    base = Answers([[1, 2, 3], [4, 5], [6]], [True, False, True], 0)
    other = Answers([[1, 2, 9], [4, 5], [7]], [False, False, True], 1)
    assert other.identical(base) == pytest.approx(1 / 3)
    assert other.identical(base, length=2) == pytest.approx(2 / 3)
    assert (base.never_ending, other.never_ending) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_layers_by_kind_are_those_of_the_routing_reports(llm: FlexiDepth) -> None:
    use = measure_kind(llm, "copy", PROMPTS, Point("flexidepth", 1))
    outputs = llm.generate(PROMPTS, max_new_tokens=64, temperature=0, return_routing=True)
    reports = [out.routing for out in outputs]  # type: ignore[union-attr]
    prompt = [n for r in reports for n in r.layers_used[: r.prompt_length]]
    answer = [n for r in reports for n in r.layers_used[r.prompt_length :]]
    assert (use.prompt_tokens, use.answer_tokens) == (len(prompt), len(answer))
    assert use.prompt_layers == pytest.approx(sum(prompt) / len(prompt))
    assert use.answer_layers == pytest.approx(sum(answer) / len(answer))
    assert use.answer_layers == pytest.approx(1 + sum(use.run_rates))
    assert use.kind == "copy" and use.routing_layers == [1, 2, 3]
    # Of answers with as many tokens each it is the textbook's standard error of a mean.
    means = [sum(own) / len(own) for r in reports if (own := r.layers_used[r.prompt_length :])]
    lengths = {len(r.layers_used) - r.prompt_length for r in reports}
    assert len(lengths) == 1 and statistics.stdev(means) > 0
    assert use.answer_stderr == pytest.approx(statistics.stdev(means) / math.sqrt(len(means)))


def test_a_kind_that_skips_everything(llm: FlexiDepth) -> None:
    use = measure_kind(llm, "copy", PROMPTS, Point("flexidepth", 3, thresholds=[1.0, 1.0, 1.0]))
    assert use.prompt_layers == use.answer_layers == 1
    assert use.run_rates == [0, 0, 0] and use.answer_stderr == 0
    alone = measure_kind(llm, "copy", PROMPTS[:1], Point("flexidepth", 1))
    assert math.isnan(alone.answer_stderr)


def test_prompts_of_every_kind_for_which_there_is_text() -> None:
    said: list[str] = []
    documents = [sentence(i, 40) for i in range(60)]
    made = made_prompts(2, 0, documents, said.append)
    assert {"copy", "summarise", "continue"} < set(made) and not said
    prompts = [prompt for kind in made.values() for prompt in kind]
    assert all(len(kind) == 2 for kind in made.values())
    assert all(len(p) == 1 and p[0]["role"] == "user" and p[0]["content"] for p in prompts)
    # "Training" texts are another split: none of these is asked in training.
    assert (
        made
        == made_prompts(2, 0, documents, said.append)
        != made_prompts(2, 1, documents, said.append)
    )
    fewer = made_prompts(2, 0, documents[:1], said.append)
    assert set(made) - set(fewer) == {"summarise", "continue"}
    assert len(said) == 2 and all(line.endswith("that kind is left out") for line in said)
