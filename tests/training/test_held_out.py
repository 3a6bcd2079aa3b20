"""The held-out part depends on what documents say and on nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from flexidepth.errors import DataError, ValueOutOfRangeError
from flexidepth.training.documents import Document
from flexidepth.training.held_out import is_held_out, split_held_out


def documents(count: int, start: int = 0) -> list[Document]:
    return [Document(f"line {n}", text=f"Document number {n}.") for n in range(start, count)]


def test_a_share_never_overlaps_with_another_run() -> None:
    train, held = split_held_out(documents(2000), share=0.1)
    assert len(train) + len(held) == 2000
    assert 140 < len(held) < 260
    # Another order, other company, other places: whoever is here again is on the same side.
    later = [Document("elsewhere", text=f"{d.text}\n") for d in reversed(documents(3000, 500))]
    train_later, held_later = split_held_out(later, share=0.1)
    assert not {d.digest() for d in train} & {d.digest() for d in held_later}
    assert not {d.digest() for d in held} & {d.digest() for d in train_later}
    assert {d.digest() for d in held_later} - {d.digest() for d in held}


def test_another_seed_is_another_split() -> None:
    _, one = split_held_out(documents(500), share=0.2)
    _, two = split_held_out(documents(500), share=0.2, seed=1)
    assert {d.text for d in one} != {d.text for d in two}


def test_the_same_in_another_process() -> None:
    code = (
        "from flexidepth.training.documents import Document as D\n"
        "from flexidepth.training.held_out import is_held_out as h\n"
        "print([h(D('', text=f'Document number {n}.'), 0.5) for n in range(40)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str([is_held_out(d, 0.5) for d in documents(40)])


def test_a_number_of_documents_and_their_copies() -> None:
    train, held = split_held_out(documents(100), num_documents=7)
    assert (len(train), len(held)) == (93, 7)
    twice = documents(100) + documents(100)
    train, held = split_held_out(twice, num_documents=7)
    assert len(held) == 8  # the copy of the seventh comes along
    assert not {d.text for d in train} & {d.text for d in held}


def test_records_and_datasets() -> None:
    records = [{"text": d.text, "id": n} for n, d in enumerate(documents(50))]
    train, held = split_held_out(records, share=0.3)
    assert [r["id"] for r in held] == [
        n for n, d in enumerate(documents(50)) if is_held_out(d, 0.3)
    ]
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{**r, "messages": None} for r in records])
    train_rows, held_rows = split_held_out(rows, share=0.3)
    assert train_rows["id"][:] == [r["id"] for r in train]
    assert held_rows["id"][:] == [r["id"] for r in held]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({}, "neither of share and num_documents"),
        ({"share": 0.1, "num_documents": 1}, "both of share and num_documents"),
        ({"share": 1}, "share is 1; wanted a number in"),
        ({"num_documents": 10}, "num_documents is 10; wanted a whole number, 1 to 9"),
        ({"share": 0.5, "seed": "a"}, "seed is 'a'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=problem):
        split_held_out(documents(10), **arguments)


def test_a_record_of_no_known_form() -> None:
    with pytest.raises(DataError, match="row 0: keys are title"):
        split_held_out([{"title": "x"}], share=0.5)
