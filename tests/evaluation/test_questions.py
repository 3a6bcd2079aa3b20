"""Multiple-choice files of several forms, prompts and tokens as lm-eval makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexidepth.errors import ValueOutOfRangeError
from flexidepth.evaluation.questions import (
    Question,
    encode_question,
    is_multiple_choice,
    parse_question,
    read_questions,
    task_files,
)
from tests.api.tokenizers import byte_tokenizer, fallback_tokenizer

ARC = {"text": ["sun", "moon"], "label": ["1", "2"]}


@pytest.mark.parametrize(
    ("record", "context", "choices", "gold"),
    [
        (
            {"query": "Question: why?\nAnswer:", "choices": ["A", "B"], "gold": 1},
            "Question: why?\nAnswer:",
            ["A", "B"],
            1,
        ),
        (
            {"query": "Question: how?\n", "choices": ["a", "b"], "gold": 0},
            "Question: how?\nAnswer:",
            ["a", "b"],
            0,
        ),
        ({"query": "There is", "choices": ["a", "b"], "gold": 0}, "There is", ["a", "b"], 0),
        (
            {"goal": "dress", "sol1": "x", "sol2": "y", "label": "1"},
            "Question: dress\nAnswer:",
            ["x", "y"],
            1,
        ),
        (
            {
                "context": "Al ran.",
                "question": "Why?",
                "answerA": "a",
                "answerB": "b",
                "answerC": "c",
                "label": "3",
            },
            "Q: Al ran. Why?\nA:",
            ["a", "b", "c"],
            2,
        ),
        (
            {"question": "What shines?", "choices": ARC, "answerKey": "2"},
            "Question: What shines?\nAnswer:",
            ["sun", "moon"],
            1,
        ),
        (
            {"question": "What burns?", "choices": ["water", "O"], "answer": "O"},
            "Question: What burns?\nAnswer:",
            ["water", "O"],
            1,
        ),
        (
            {"question_stem": "It shines", "choices": ARC, "answerKey": "1"},
            "It shines",
            ["sun", "moon"],
            0,
        ),
        (
            {
                "query": "Question: Where?\nChoices:\nA. bank\nB. the mall\nAnswer:",
                "choices": ["A", "B"],
                "gold": 1,
            },
            "Question: Where?\nAnswer:",
            ["bank", "the mall"],
            1,
        ),
        (
            {"query": "Plan A. Which?\nA. one\nAnswer:", "choices": ["A", "B"], "gold": 1},
            "Plan A. Which?\nA. one\nAnswer:",
            ["A", "B"],
            1,
        ),
        (
            {"question": "Where?", "choices": ["bank", "mall"], "answer": "mall"},
            "Question: Where?\nAnswer:",
            ["bank", "mall"],
            1,
        ),
        (
            {"question": "Where?", "choices": ["bank", "mall"], "answer": 1},
            "Question: Where?\nAnswer:",
            ["bank", "mall"],
            1,
        ),
        (
            {"question": "Where?", "choices": ["bank", "mall"], "answer": "B"},
            "Question: Where?\nAnswer:",
            ["bank", "mall"],
            1,
        ),
    ],
)
def test_forms(record: dict[str, Any], context: str, choices: list[str], gold: int) -> None:
    assert parse_question("f:1", record) == Question(context, choices, gold)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"context": "1 + 1", "answer": "2"}, r"f:1: fields \['answer', 'context'\]"),
        ({"question": "a", "choices": ["x", "y"]}, "f:1: fields"),
        ({"query": "a", "choices": ["x"], "gold": 0}, "wanted a question and two texts or more"),
        ({"query": "a", "choices": ["x", ""], "gold": 0}, "two texts or more"),
        ({"query": " ", "choices": ["x", "y"], "gold": 0}, "wanted a question"),
        ({"query": "a", "choices": ["x", "y"], "gold": 2}, "the answer is 2; wanted an index"),
        ({"question": "a", "choices": ["x", "y"], "answer": "z"}, "the answer is 'z'"),
        ({"goal": "a", "sol1": "x", "sol2": "y", "label": "-1"}, "the answer is '-1'"),
    ],
)
def test_records_that_are_no_question(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=message):
        parse_question("f:1", record)


def test_tokens_of_context_and_answer_are_those_of_one_text() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode_question(Question("why?\n", ["é", "no way"], 0), tokenizer)
    # White space at the end of the context belongs to the answer.
    assert tokenizer.decode(encoded.context) == "why?"
    assert [tokenizer.decode(choice) for choice in encoded.choices] == ["\n é", "\n no way"]
    assert encoded.lengths == [1, 6]  # characters, without the space between
    with_bos = encode_question(Question("why?", ["no", "yes"], 0), byte_tokenizer(adds_bos=True))
    assert with_bos.context[0] == 256
    assert all(256 not in choice for choice in with_bos.choices)


def test_an_answer_that_melts_into_the_context_keeps_a_token() -> None:
    encoded = encode_question(Question("a", ["lo", "a"], 0), fallback_tokenizer())
    assert all(encoded.choices)


def test_files_of_a_directory(tasks: Path, tmp_path: Path) -> None:
    files = task_files(tasks)
    assert [path.stem for path in files] == ["letters", "other", "words"]
    assert [is_multiple_choice(path) for path in files] == [True, False, True]
    assert task_files(files[0]) == [files[0]]
    assert len(read_questions(files[0], 5)) == 5
    with pytest.raises(ValueOutOfRangeError, match=r"no \.jsonl file"):
        task_files(tmp_path)
