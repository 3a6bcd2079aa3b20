"""The machine and the commit that results name."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from flexidepth.bench.machine import describe_machine
from flexidepth_ext import _C


def test_machine_is_named() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert 1 <= machine["usable_threads"] <= 1024
    assert machine["versions"]["torch"] == torch.__version__
    json.dumps(machine)


def test_commit_is_that_of_these_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source = tmp_path / "machine.py"
    source.write_text("one")
    monkeypatch.setattr("flexidepth.bench.machine.__file__", str(source))
    built = _C.build_info()["commit"] or "not known"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of somebody else")
    assert describe_machine()["commit"] == built
    git("add", "machine.py")
    git("commit", "-q", "-m", "ours")
    assert describe_machine()["commit"] == git("rev-parse", "--short", "HEAD")
    source.write_text("two")
    assert describe_machine()["commit"] == git("rev-parse", "--short", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert describe_machine()["commit"] == built
