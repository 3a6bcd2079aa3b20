"""Retraining by one command: every step is a command that exists, and what is there is not made twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer

from flexidepth.bench import retrain
from flexidepth.bench.retrain import Stage, run_stage, stages
from flexidepth.cli.app import app
from flexidepth.errors import FlexiDepthError


def test_every_step_is_a_command_with_these_options(tmp_path: Path) -> None:
    made = stages(tmp_path, "smollm2-135m", Path("gsm8k.jsonl"))
    names = [stage.name for stage in made]
    assert names == [
        *("texts", "answers, train", "answers, held_out", "training", "calibration", "quality"),
    ]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for stage in made[1:]:
        module, name, *arguments = stage.command
        assert module == "flexidepth"
        # Paths that have to exist do, later on.
        words = [str(tmp_path) if word.endswith(".jsonl") else word for word in arguments]
        commands[name].make_context(name, words)
    assert made[0].command[0] == "flexidepth.bench.training_data"
    assert made[3].command.count(str(tmp_path / "data" / "train" / "distilled.jsonl")) == 3
    assert "--resume" not in made[3].command
    (tmp_path / "run").mkdir()
    assert "--resume" in stages(tmp_path, "smollm2-135m", None)[3].command


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    class Result:
        returncode = 0

    def note(command: list[str], **_: object) -> Result:
        ran.append(command)
        return Result()

    monkeypatch.setattr(retrain.subprocess, "run", note)
    run_stage(Stage("a", ["flexidepth", "doctor"], tmp_path))
    assert ran == []
    run_stage(Stage("b", ["flexidepth", "doctor"], tmp_path / "missing"))
    assert ran == [[sys.executable, "-m", "flexidepth", "doctor"]]
    Result.returncode = 3
    with pytest.raises(FlexiDepthError, match=r"c failed with exit code 3.*goes on from here"):
        run_stage(Stage("c", ["flexidepth", "doctor"]))
