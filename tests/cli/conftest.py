"""A tiny model with a tokenizer and a chat template, and ways to call the command on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from flexidepth.cli import app
from tests.checkpoints.tiny import base_model, write_gguf

Command = Callable[..., Result]
Script = Callable[..., "subprocess.CompletedProcess[str]"]

_COLOR_VARIABLES = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "FLEXIDEPTH_DEBUG", "COLUMNS")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model of four layers (the last two get routed) as a GGUF file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return str(write_gguf(path, base_model(max_position_embeddings=256)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Call the command in this process."""
    for name in _COLOR_VARIABLES:
        # Set first, so that what --debug sets is undone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def call(*arguments: object, text: str | None = None) -> Result:
        return CliRunner().invoke(
            app, [str(a) for a in arguments], input=text, prog_name="flexidepth"
        )

    return call


@pytest.fixture
def script() -> Script:
    """Call the command in a process of its own."""

    def call(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k not in _COLOR_VARIABLES}
        return subprocess.run(
            [sys.executable, "-m", "flexidepth", *(str(a) for a in arguments)],
            env={**clean, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )

    return call


@pytest.fixture
def report(model: str, run: Command, tmp_path: Path) -> Path:
    """A routing report of twelve tokens' making, half of the routed layers skipped."""
    path = tmp_path / "routing.json"
    result = run(
        "generate",
        model,
        "hello hello",
        "--max-new-tokens",
        12,
        "--force-routing",
        "0.5",
        "--routing-out",
        path,
        "-t",
        1,
    )
    assert result.exit_code == 0, result.output
    return path
