"""Answers by likelihood: what loglikelihood() gives, contexts shared."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest
import torch

from flexidepth import FlexiDepth
from flexidepth.checkpoints import open_checkpoint
from flexidepth.evaluation.choices import choice_logprobs, score_questions, standard_error
from flexidepth.evaluation.data import of_questions
from flexidepth.evaluation.points import Point, base_point
from flexidepth.evaluation.questions import EncodedQuestion, Question, encode_question
from flexidepth.evaluation.torch_engine import TorchEngine
from flexidepth.loading import load_engine

from .conftest import save_tiny, sentence

QUESTIONS = [
    Question(f"Question: {sentence(i, 3 + 5 * i)}?\nAnswer:", choices, 0)
    for i, choices in enumerate(
        (["A", "the cat sat", "mat"], ["on a mat", "x"], ["to be there", "at noon", "no", "it was"])
    )
]


def encoded(llm: FlexiDepth) -> list[EncodedQuestion]:
    return [encode_question(question, llm.tokenizer) for question in QUESTIONS]


@pytest.mark.parametrize(
    "point", [base_point(), Point("flexidepth", 1), Point("r", 1, force=1 / 3)]
)
def test_likelihoods_are_those_of_whole_texts(llm: FlexiDepth, point: Point) -> None:
    routing, thresholds = point.resolve(llm.config)
    found, jobs = choice_logprobs(llm.engine, encoded(llm), routing, thresholds)
    for question, values in zip(QUESTIONS, found, strict=True):
        want = [
            llm.loglikelihood(question.context, " " + choice, force_routing=point.force)[0]
            for choice in question.choices
        ]
        assert values == pytest.approx(want, rel=1e-4)
    computed = sum(len(job.ids) for job in jobs)
    contexts = sum(len(question.context) for question in QUESTIONS)
    behind = sum(len(choice) for question in QUESTIONS for choice in question.choices)
    assert computed == contexts + behind  # a choice's space is computed, its last letter is not
    assert all(job.cache.length == 0 for job in jobs)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("point", [base_point(), Point("m", 1, thresholds=[0.4, 0.6, 0.5])])
def test_the_trainable_model_computes_answers_behind_a_shared_question(
    llm: FlexiDepth, tmp_path: Path, point: Point, window: int | None
) -> None:
    checkpoint = open_checkpoint(save_tiny(tmp_path / "tiny", sliding_window=window))
    engine = TorchEngine(checkpoint, torch.float32)
    other = load_engine(
        checkpoint, torch.float32, num_threads=1, strict_router=False, progress=None
    )
    with closing(other):
        found, want = (
            choice_logprobs(e, encoded(llm), *point.resolve(checkpoint.config))
            for e in (engine, other)
        )
    for ours, theirs in zip(found[0], want[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert [job.ran for job in found[1]] == [job.ran for job in want[1]]


def test_calibration_counts_the_layers_that_a_task_counts(llm: FlexiDepth) -> None:
    from flexidepth.training.calibration import CalibrationPoint, calibrate_each

    text = of_questions(encoded(llm), 10_000)
    found = calibrate_each(llm, text.sequences, [1.5], counted=text.counted)[1.5]
    assert isinstance(found, CalibrationPoint)
    point = Point("flexidepth", 1.5, thresholds=found.thresholds)
    score = score_questions(llm.engine, encoded(llm), point)
    assert score.skipped == pytest.approx(found.layers_skipped)


def test_calibration_takes_whole_questions_until_there_are_enough(llm: FlexiDepth) -> None:
    one = of_questions(encoded(llm), 1)
    every = of_questions(encoded(llm), 10_000)
    numbers = [len(question.choices) for question in QUESTIONS]
    assert len(one.sequences) in numbers and len(every.sequences) == sum(numbers)
    assert one.sequences == every.sequences[: len(one.sequences)]


def test_accuracy_counts_the_likeliest(llm: FlexiDepth) -> None:
    routing, _ = base_point().resolve(llm.config)
    questions = encoded(llm)
    found, _ = choice_logprobs(llm.engine, questions, routing, None)
    best = [values.index(max(values)) for values in found]
    normed = [
        [v / n for v, n in zip(f, q.lengths, strict=True)]
        for f, q in zip(found, questions, strict=True)
    ]
    best_normed = [values.index(max(values)) for values in normed]
    assert best != best_normed  # so that the one is not mistaken for the other

    def with_gold(golds: list[int]) -> list[EncodedQuestion]:
        return [
            EncodedQuestion(q.context, q.choices, q.lengths, gold)
            for q, gold in zip(questions, golds, strict=True)
        ]

    right = score_questions(llm.engine, with_gold(best), base_point())
    assert (right.acc, right.acc_stderr, right.questions, right.skipped) == (1, 0, 3, 0)
    assert right.acc_norm == sum(a == b for a, b in zip(best, best_normed, strict=True)) / 3
    assert score_questions(llm.engine, with_gold(best_normed), base_point()).acc_norm == 1


def test_skipped_layers_are_counted_over_all_tokens(llm: FlexiDepth) -> None:
    point = Point("random", 1, force=1 / 3)
    assert score_questions(llm.engine, encoded(llm), point).skipped == 1


def test_standard_error() -> None:
    assert standard_error(0.5, 101) == pytest.approx(0.05)
    assert math.isnan(standard_error(1.0, 1))
