"""Long work by one command: every step is a command that exists, and what is there is not made twice."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from flexidepth import load_trainable, open_checkpoint, save_routing
from flexidepth.bench import reproduce, retrain, shipped_form
from flexidepth.bench.stages import Stage, run_stage
from flexidepth.checkpoints.source import PRETRAINED
from flexidepth.cli.app import app
from flexidepth.errors import FlexiDepthError
from tests.cli.conftest import Command
from tests.evaluation.conftest import CALIBRATION, save_tiny

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def parse(stages: Sequence[Stage], folder: Path) -> None:
    """Have each command of `flexidepth` read its words."""
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    commands["bench"] = commands["bench"].commands["run"]
    for stage in stages:
        module, name, *arguments = stage.command
        if module == "flexidepth":
            # Paths that have to exist do, later on.
            words = [str(folder) if word.endswith(".jsonl") else word for word in arguments]
            commands[name].make_context(name, words)


def test_every_step_of_retraining_is_a_command_with_these_options(tmp_path: Path) -> None:
    made = retrain.stages(tmp_path, "smollm2-135m", Path("gsm8k.jsonl"))
    assert [stage.name for stage in made] == [
        *("texts", "answers, train", "answers, held_out", "training", "shipped form"),
        *("calibration", "quality"),
    ]
    parse(made, tmp_path)
    assert made[0].command[0] == "flexidepth.bench.training_data"
    assert made[3].command.count(str(tmp_path / "data" / "train" / "distilled.jsonl")) == 3
    assert made[3].command.count(str(tmp_path / "data" / "train" / "gsm8k.jsonl")) == 1
    assert "--resume" not in made[3].command
    trained, routing = tmp_path / "run" / "further" / "routing", tmp_path / "routing"
    assert made[3].done == trained
    assert made[4].command[1:] == [str(trained), str(routing)] and made[4].done == routing
    assert made[5].command[2] == str(routing) == made[6].command[2]
    (tmp_path / "run").mkdir()
    without = retrain.stages(tmp_path, "smollm2-135m", None)[3].command
    assert "--resume" in without and not any("gsm8k" in word for word in without)


def test_every_step_of_measuring_is_a_command_with_these_options(tmp_path: Path) -> None:
    made = reproduce.stages(tmp_path, tmp_path, only_speed=False)
    names = [stage.name for stage in made]
    assert names == ["speed", "texts", "answers, held_out", "quality", "task scores"]
    parse(made, tmp_path)
    assert [s.name for s in reproduce.stages(tmp_path, None, only_speed=True)] == ["speed"]
    assert made[1].command[-2:] == ["--gsm8k", str(tmp_path)]


def test_the_page_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Command
) -> None:
    from typer.testing import CliRunner

    sources = {
        "speed": "intel-xeon-amx-2-cores",
        "quality": "smollm2-135m-quality",
        "tasks": "smollm2-135m-tasks",
    }
    for name, source in sources.items():
        shutil.copytree(RESULTS / source, tmp_path / name)
    ran: list[str] = []
    monkeypatch.setattr(reproduce, "run_stages", lambda found: ran.extend(s.name for s in found))
    page = typer.Typer()
    page.command()(reproduce.main)
    result = CliRunner().invoke(page, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert ran == ["speed", "texts", "answers, held_out", "quality", "task scores"]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for line in ("| ours, dense |", "| trained routers: prose |", "| trained routers | 45.5 %"):
        assert line in text


def test_what_is_there_is_not_made_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_stage(Stage("a", ["nothing.of.this.name"], tmp_path))
    assert "a: there already" in capfd.readouterr().err
    run_stage(Stage("b", ["flexidepth", "--version"], tmp_path / "missing"))
    assert capfd.readouterr().out.startswith("flexidepth ")
    with pytest.raises(FlexiDepthError, match=r"c failed with exit code 1.*goes on from here"):
        run_stage(Stage("c", ["nothing.of.this.name"]))


def test_calibration_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command changes a file that is there already: what says that it is over is a mark."""
    made = retrain.stages(tmp_path, "smollm2-135m", None)
    (tmp_path / "routing").mkdir()
    stage = dataclasses.replace(made[5], command=["flexidepth", "--version"])
    with pytest.raises(FlexiDepthError):
        run_stage(dataclasses.replace(stage, command=["nothing.of.this.name"]))
    assert stage.done is not None and not stage.done.exists()
    run_stage(stage)
    assert stage.done.exists()
    run_stage(dataclasses.replace(stage, command=["nothing.of.this.name"]))


def test_the_shipped_form(tmp_path: Path) -> None:
    """Adapters in bfloat16, routers in float16, and nothing of a calibration of what was not rounded."""
    from typer.testing import CliRunner

    plain = save_tiny(tmp_path / "plain", calibration=CALIBRATION)
    model = load_trainable(plain)
    trained = save_routing(model, tmp_path / "trained", base_model=plain, dtype=torch.float32)
    rounding = typer.Typer()
    rounding.command()(shipped_form.main)
    out = tmp_path / "out"
    result = CliRunner().invoke(rounding, [str(trained), str(out)])
    assert result.exit_code == 0, result.output
    stored = load_file(out / "routing.safetensors")
    types = {(".router." in n, t.dtype) for n, t in stored.items() if t.dim() > 1}
    assert types == {(True, torch.float16), (False, torch.bfloat16)}
    shipped = load_file(PRETRAINED / retrain.MODEL / "routing.safetensors")
    assert types == {(".router." in n, t.dtype) for n, t in shipped.items() if t.dim() > 1}
    made = open_checkpoint(out)
    assert made.config.calibration == [] and made.config.skip_presets == {}
    assert made.routers_trained and made.config.router_thresholds == model.config.router_thresholds
    result = CliRunner().invoke(rounding, [str(plain), str(tmp_path / "other")])
    assert result.exit_code == 1 and "no routing checkpoint" in result.output


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_signal_ends_the_stage_too(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(
        "import os, time, pathlib\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    script = "from flexidepth.bench.stages import Stage, run_stage; run_stage(Stage('x', ['long']))"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    pid = tmp_path / "pid"
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
