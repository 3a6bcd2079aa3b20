"""flexidepth eval: what it prints and writes, and arguments that it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexidepth.evaluation import run as evaluation_run
from flexidepth.evaluation.points import METHODS
from tests.cli.conftest import Command
from tests.evaluation.conftest import chat, model, prose, tasks  # noqa: F401  (fixtures)

SMALL = ("--tokens", 60, "--window", 30, "--calibration-tokens", 60, "--skipped", "0,1")
SMALL = (*SMALL, "--per-kind", 0, "--max-new-tokens", 4, "--answers", 1, "--limit", 3, "-t", 1)


def test_tables_on_standard_output_rows_on_standard_error(
    run: Command,
    model: Path,  # noqa: F811
    prose: Path,  # noqa: F811
    chat: Path,  # noqa: F811
    tasks: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    texts = ("--prose", prose, "--code", prose, "--chat", chat, "--distilled", chat)
    result = run("eval", model, *texts, "--tasks", tasks, *SMALL, "--output-dir", out)
    assert result.exit_code == 0, result.output
    for name, predictions in {"prose": 58, "code": 58, "chat": 23, "distilled": 23}.items():
        assert f"{name}, {predictions} predictions" in result.stdout  # of conversations the answers
    for word in ("words, 3 questions", "shortgpt"):
        assert word in result.stdout
    assert "shortgpt, 1 layers skipped: prose, perplexity" in result.stderr
    assert f"wrote {out / 'eval.json'}" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["eval.json", "eval.md", "eval.png"]


def test_json(run: Command, model: Path, prose: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = ("--prose", prose, "--methods", "random", *SMALL, "--json")
    result = run("eval", model, *arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    found = [(row["method"], row["asked"]) for row in content["rows"]]
    assert found == [("base", 0), ("random", 0), ("random", 1)]
    # What --json prints is what plot draws.
    path = tmp_path / "eval.json"
    path.write_text(result.stdout)
    drawn = run("plot", path, "-o", tmp_path / "eval.svg")
    assert drawn.exit_code == 0, drawn.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--skipped", "0,x"), "wanted numbers separated by commas"),
        (("--also", "x"), "wanted NAME=MODEL"),
        (("--also", "=x"), "wanted NAME=MODEL"),
        (("--also", "a=x", "--also", "a=y"), "wanted each name once"),
        (("--methods", "laco"), "wanted some of flexidepth"),
        (("--window", 1), "window is 1"),
    ],
)
def test_wrong_usage(run: Command, arguments: tuple[object, ...], message: str) -> None:
    result = run("eval", "no-such-model", "--prose", "x.jsonl", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_nothing_to_measure(run: Command) -> None:
    result = run("eval", "no-such-model")
    assert result.exit_code == 2 and "neither texts nor tasks" in " ".join(result.stderr.split())


def test_a_missing_file_is_one_line(run: Command, model: Path, tmp_path: Path) -> None:  # noqa: F811
    result = run("eval", model, "--prose", tmp_path / "none.jsonl", *SMALL)
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'none.jsonl'}: no such file or directory; wanted")


def test_every_method_is_measured_unless_others_are_asked_for(run: Command) -> None:
    assert ",".join(METHODS) in "".join(run("eval", "--help").stdout.replace("│", " ").split())


def test_ctrl_c_says_what_is_kept(
    run: Command,
    model: Path,  # noqa: F811
    prose: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_run, "_measure_baselines", interrupted)
    result = run("eval", model, "--prose", prose, *SMALL, "--output-dir", tmp_path)
    assert result.exit_code == 130
    assert f"what was measured is kept in {tmp_path}" in result.stderr
    rows = json.loads((tmp_path / "eval.partial.json").read_text())["rows"]
    routers = {"flexidepth", "dial", "static-adapters", "random-adapters"}
    assert {row["method"] for row in rows} == {"base", *routers}
