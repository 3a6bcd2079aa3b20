"""Multiple-choice questions in the forms that public sets come in, with the prompts of lm-eval.

But where a question lists its choices and wants a letter, the choices themselves are compared: a small model
names the same letter whatever it is asked, and that cannot get worse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, ValueOutOfRangeError
from ..training.records import read_records

_LISTED = re.compile(r"^([A-Z])\. (.+)$", re.MULTILINE)
_FORMS = (
    "query, choices, gold; goal, sol1, sol2, label; question or question_stem, choices, answer or answerKey; "
    "context, question, answerA, answerB, answerC, label"
)


@dataclass(frozen=True)
class Question:
    """context: what stands before an answer. choices: the answers. gold: index of the right one."""

    context: str
    choices: list[str]
    gold: int


@dataclass(frozen=True)
class EncodedQuestion:
    """The same in token ids; lengths: characters of each choice, by which acc_norm divides."""

    context: list[int]
    choices: list[list[int]]
    lengths: list[int]
    gold: int


def task_files(path: Path) -> list[Path]:
    """The jsonl files of a directory, or the one file; ValueOutOfRangeError where there is none."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueOutOfRangeError(f"eval: {path}: no .jsonl file in it; wanted one for each task")
    return files


def is_multiple_choice(path: Path) -> bool:
    """Whether the first line of a file is a question of a known form."""
    for where, record in _records(path):
        try:
            parse_question(where, record)
        except ValueOutOfRangeError:
            return False
        return True
    return False


def read_questions(path: Path, limit: int) -> list[Question]:
    """The first `limit` questions of a file; ValueOutOfRangeError for a line of an unknown form."""
    return [parse_question(*line) for line in islice(_records(path), limit)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE, line N", object) of each line; DataError for a line that is none."""
    for where, found in read_records([path]):
        if isinstance(found, DataError):
            raise found
        yield where, found


def parse_question(where: str, record: dict[str, Any]) -> Question:
    """A question out of a record; `where` names it in errors."""
    question = _by_form(record)
    if question is None:
        raise ValueOutOfRangeError(
            f"eval: {where}: fields {sorted(record)}; wanted one of these sets: {_FORMS}"
        )
    context, choices, gold = question
    fit = len(choices) >= 2 and all(isinstance(c, str) and c for c in choices)
    if not fit or not context.strip():
        raise ValueOutOfRangeError(
            f"eval: {where}: question {context!r} with choices {choices!r}; wanted a question and two texts or more"
        )
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueOutOfRangeError(
            f"eval: {where}: the answer is {gold!r}; wanted an index from 0 to {len(choices) - 1}, or one of "
            "the labels or choices"
        )
    return Question(context, list(choices), gold)


def _by_form(record: dict[str, Any]) -> tuple[str, Sequence[Any], Any] | None:
    fields = record.keys()
    if {"query", "choices", "gold"} <= fields:
        query = str(record["query"])
        # Sets that leave the answer's cue to the harness.
        if query.startswith("Question:") and not query.rstrip().endswith("Answer:"):
            query = f"{query.rstrip()}\nAnswer:"
        return *_without_letters(query, record["choices"]), record["gold"]
    if {"goal", "sol1", "sol2", "label"} <= fields:
        context = f"Question: {record['goal']}\nAnswer:"
        return context, [record["sol1"], record["sol2"]], _index(record["label"])
    if {"context", "question", "answerA", "answerB", "answerC", "label"} <= fields:
        choices = [record[f"answer{letter}"] for letter in "ABC"]
        label = _index(record["label"])
        gold = label - 1 if isinstance(label, int) else label  # counted from 1
        return f"Q: {record['context']} {record['question']}\nA:", choices, gold
    if "choices" in fields and fields & {"question", "question_stem"}:
        return _listed(record)
    return None


def _listed(record: dict[str, Any]) -> tuple[str, Sequence[Any], Any] | None:
    """{"question", "choices": [...] or {"text": [...], "label": [...]}, "answer" or "answerKey"}."""
    choices, labels = record["choices"], [chr(ord("A") + i) for i in range(26)]
    if isinstance(choices, dict):
        choices, labels = choices.get("text", ()), choices.get("label", labels)
    answer = record.get("answerKey", record.get("answer"))
    if answer is None or not isinstance(choices, Sequence) or isinstance(choices, str):
        return None
    answer = answer.strip() if isinstance(answer, str) else answer
    names = list(labels)[: len(choices)]  # a choice may be called as no label is
    gold = next(
        (list(known).index(answer) for known in (names, choices) if answer in known), answer
    )
    gold = gold if isinstance(gold, int) else _index(gold)
    if "question_stem" in record:
        return str(record["question_stem"]), choices, gold
    return f"Question: {str(record['question']).strip()}\nAnswer:", choices, gold


def _without_letters(query: str, choices: Sequence[Any]) -> tuple[str, Sequence[Any]]:
    """(query, choices), with what "A. ...", "B. ..." in the query stand for in place of the letters."""
    listed = _LISTED.findall(query)
    if not listed or [letter for letter, _ in listed] != list(choices):
        return query, choices
    rest = _LISTED.sub("", query).replace("Choices:", "")
    return re.sub(r"\n{2,}", "\n", rest), [text for _, text in listed]


def _index(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


def encode_question(question: Question, tokenizer: Any) -> EncodedQuestion:
    """Token ids as lm-eval makes them: context and answer tokenised as one text, cut behind the context's
    tokens; white space at the end of the context goes to the answer."""
    context = question.context.rstrip()
    between = question.context[len(context) :] + " "
    before = list(tokenizer.encode(context))
    choices = []
    for choice in question.choices:
        after = list(tokenizer.encode(context + between + choice))[len(before) :]
        # None where the answer melts into the context's last token.
        choices.append(after or tokenizer.encode(between + choice, add_special_tokens=False))
    return EncodedQuestion(before, choices, [len(c) for c in question.choices], question.gold)
