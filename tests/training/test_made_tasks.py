"""Made-up tasks: right answers, none twice, training and evaluation apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexidepth.errors import DataError, ValueOutOfRangeError
from flexidepth.training.documents import read_documents
from flexidepth.training.made_tasks import FROM_TEXTS, KINDS, make_tasks
from tests.cli.conftest import Command, run

__all__ = ["run"]

MADE = [kind for kind in KINDS if kind not in FROM_TEXTS]
TEXTS = [f"Text {n} " + " ".join(f"word{i}" for i in range(n)) for n in range(20, 240)]


def tasks(kind: str, n: int, seed: int = 0, split: str = "train") -> list[dict[str, Any]]:
    return make_tasks(kind, n, seed, split=split, texts=TEXTS if kind in FROM_TEXTS else None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_different_tasks(kind: str) -> None:
    one = tasks(kind, 100)
    assert one == tasks(kind, 100)
    assert one[:40] == tasks(kind, 40)
    assert len({task["prompt"] for task in one}) == 100
    assert {task["kind"] for task in one} == {kind}
    assert [t["prompt"] for t in one] != [t["prompt"] for t in tasks(kind, 100, seed=1)]


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_never_meet(kind: str) -> None:
    def asked(found: list[dict[str, Any]]) -> set[Any]:
        if kind in FROM_TEXTS:
            return {re.search(r"Text \d+", t["prompt"])[0] for t in found}  # type: ignore[index]
        numbers = [tuple(re.findall(r"\d+", t["prompt"])) for t in found]
        return set(numbers) if kind in ("add", "multiply") else {t["answer"] for t in found}

    train = asked([t for seed in range(8) for t in tasks(kind, 150, seed)])
    evaluation = asked([t for seed in range(8) for t in tasks(kind, 15, seed, "eval")])
    assert train and evaluation and not train & evaluation


def test_a_text_is_on_one_side_for_both_kinds() -> None:
    def texts(kind: str, n: int, split: str) -> set[str]:
        prompts = [task["prompt"] for task in tasks(kind, n, split=split)]
        return {re.search(r"Text \d+", prompt)[0] for prompt in prompts}  # type: ignore[index]

    assert not texts("summarise", 150, "train") & texts("continue", 15, "eval")


def test_answers_are_right() -> None:
    for task in tasks("add", 200):
        a, b = map(int, re.findall(r"\d+", task["prompt"]))
        assert task["answer"] == str(a + b)
    for task in tasks("multiply", 200):
        a, b = map(int, re.findall(r"\d+", task["prompt"]))
        assert task["answer"] == str(a * b)
    for kind in ("copy", "list"):
        assert all(task["prompt"].endswith(task["answer"]) for task in tasks(kind, 50))
    assert all(len(task["answer"].split(", ")) >= 4 for task in tasks("list", 50))
    for task in tasks("summarise", 20):
        assert task["answer"] is None
        assert len(task["prompt"].split()) >= 30
    (task,) = make_tasks("continue", 1, split="train", texts=[TEXTS[60]] * 2)
    assert task["prompt"].endswith("word38") and "word39" not in task["prompt"]  # half of it


def test_the_same_in_another_process() -> None:
    code = (
        "import json; from flexidepth.training.made_tasks import make_tasks as m\n"
        "print(json.dumps([m(k, 3) for k in ('copy', 'list', 'add', 'multiply')]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == [tasks(kind, 3) for kind in MADE]


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueOutOfRangeError, match="kind 'divide'; wanted one of copy"):
        make_tasks("divide", 1)
    with pytest.raises(ValueOutOfRangeError, match="split 'test'"):
        make_tasks("add", 1, split="test")
    with pytest.raises(ValueOutOfRangeError, match="n is 0"):
        make_tasks("add", 0)
    with pytest.raises(ValueOutOfRangeError, match="kind 'summarise' needs texts"):
        make_tasks("summarise", 1)
    with pytest.raises(ValueOutOfRangeError, match="kind 'add' makes its own text"):
        make_tasks("add", 1, texts=TEXTS)
    with pytest.raises(ValueOutOfRangeError, match=r"only 0 different 'continue' .* more texts"):
        make_tasks("continue", 1, texts=["too short"])


def test_the_command(run: Command, tmp_path: Path) -> None:
    out = tmp_path / "tasks.jsonl"
    result = run("make-prompts", out, "--kinds", "copy,add", "--count", 7, "--seed", 3)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == make_tasks("copy", 7, 3) + make_tasks("add", 7, 3)
    # With their answers they are documents, too.
    assert [d.messages[1]["content"] for d in read_documents(out) if d.messages] == [
        task["answer"] for task in lines
    ]
    result = run("make-prompts", out)
    assert result.exit_code == 1 and "--overwrite to replace it" in result.output
    assert len(out.read_text(encoding="utf-8").splitlines()) == 14
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    arguments = ("--kinds", "summarise", "--count", 5, "--texts", texts, "--overwrite")
    assert run("make-prompts", out, *arguments, "--split", "eval").exit_code == 0
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == tasks("summarise", 5, split="eval")
    with pytest.raises(DataError, match="prompt without an answer"):
        list(read_documents(out))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--kinds", "divide"), "'divide': wanted some of"),
        (("--split", "test"), "wanted train or eval"),
        (("--kinds", "continue,add"), "--kinds continue needs --texts"),
        (("--texts", "x.txt"), "none of which is among --kinds"),
    ],
)
def test_wrong_usage(
    run: Command, tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    result = run("make-prompts", tmp_path / "out.jsonl", *arguments)
    assert result.exit_code == 2
    assert problem in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []
