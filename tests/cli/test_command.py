"""The command as a whole: help, version, exit codes, errors, speed of its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import flexidepth
from flexidepth.cli import common
from flexidepth.errors import ModelNotFoundError
from tests.cli.conftest import Command, Script

COMMANDS = (
    *("demo", "generate", "chat", "bench", "eval", "train", "calibrate", "convert", "merge"),
    *("make-prompts", "distill-data"),
    *("inspect", "plot", "doctor"),
)


def test_root_help_lists_every_command_and_an_example(run: Command) -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: flexidepth demo" in result.stdout
    listed = [line.split()[0] for line in result.stdout.split("Commands:")[1].splitlines() if line]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("name", [*COMMANDS, "bench compare", "bench plot", "bench ops"])
def test_every_help_has_an_example(run: Command, name: str) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: flexidepth {name}" in result.stdout


def test_version(run: Command) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"flexidepth {flexidepth.__version__}\n")


def test_wrong_option_is_answered_with_the_right_one(run: Command) -> None:
    result = run("generate", "model", "text", "--max-new-token", 3)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--max-new-tokens" in result.stderr


def test_unknown_command_is_wrong_usage(run: Command) -> None:
    result = run("generat")
    assert result.exit_code == 2
    assert "generat" in result.stderr


def test_error_is_one_line_without_traceback(script: Script, tmp_path: Path) -> None:
    result = script("inspect", tmp_path / "nothing.gguf")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert str(tmp_path / "nothing.gguf") in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_debug_lets_the_error_through(run: Command, tmp_path: Path) -> None:
    result = run("--debug", "inspect", tmp_path / "nothing.gguf")
    assert isinstance(result.exception, ModelNotFoundError)


def test_unexpected_error_names_its_type_and_the_way_to_its_place(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("flexidepth.checkpoints.open_checkpoint", fail)
    result = run("inspect", "model")
    assert result.exit_code == 1
    assert result.stderr == "error: unexpected KeyError: 'lost'; --debug shows where\n"


def test_interrupt_ends_with_130(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flexidepth.checkpoints.open_checkpoint", interrupt)
    result = run("inspect", "model")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_is_gone_is_no_news(model: str, unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "flexidepth", "inspect", model],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=300), errors) == (1, b"")


def test_system_error_names_the_file_alone() -> None:
    error = FileNotFoundError(2, "No such file or directory", "there.json")
    assert common.describe_error(error) == "there.json: No such file or directory"
    assert common.describe_error(MemoryError()) == "MemoryError"


def test_help_loads_no_heavy_library() -> None:
    """Half a second of start-up is the cost of one such import."""
    code = (
        "import sys; from flexidepth.cli import app; from typer.testing import CliRunner;"
        "result = CliRunner().invoke(app, ['generate', '--help']); assert result.exit_code == 0;"
        "print([m for m in ('torch', 'numpy', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_doctor_loads_no_heavy_library() -> None:
    code = (
        "import sys; from flexidepth.cli import app; from typer.testing import CliRunner;"
        "CliRunner().invoke(app, ['doctor']);"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_says_by_its_exit_code_whether_all_is_well(
    run: Command, monkeypatch: pytest.MonkeyPatch, ok: bool, code: int
) -> None:
    monkeypatch.setattr("flexidepth.doctor.collect", lambda: {"ok": ok, "problems": []})
    result = run("doctor", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["ok"] is ok


def test_doctor_reports_the_build(run: Command) -> None:
    report = json.loads(run("doctor", "--json").stdout)
    assert report["packages"]["flexidepth"]
    assert "flexidepth_ext._C" in run("doctor").stdout


def test_json_has_no_number_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_json({"a": [float("nan"), 1.5], "b": (float("inf"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None]}


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        (None, None),
        ("all", "all"),
        ("dense", "dense"),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("16,18, 20", [16, 18, 20]),
        ("0", [0]),
    ],
)
def test_force_routing(text: str | None, meaning: object) -> None:
    assert common.parse_force_routing(text) == meaning


@pytest.mark.parametrize("text", ["", "some", "1,", "1-3", "0.5x", "nan"])
def test_force_routing_that_means_nothing(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="wanted all, none, dense"):
        common.parse_force_routing(text)


def test_lazy_exports_are_complete() -> None:
    for name in flexidepth.__all__:
        assert getattr(flexidepth, name).__name__ == name
    with pytest.raises(AttributeError, match="Flexidepth"):
        _ = flexidepth.Flexidepth
    assert set(flexidepth.__all__) <= set(dir(flexidepth))
