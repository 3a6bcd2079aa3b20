"""A test that breaks the device is told, and the tests behind it run in another process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import pytest, torch
from tests.cuda.broken_device import *

broken = []

def synchronize():
    if broken:
        raise RuntimeError("an illegal memory access was encountered")

torch.cuda.synchronize = synchronize
"""
TESTS = """
from conftest import broken

def test_before():
    assert not broken

def test_that_fails():
    assert 3 == 4

def test_behind_a_failure():
    assert not broken

def test_that_breaks():
    broken.append(None)
    assert 1 == 2

def test_behind():
    assert not broken

def test_at_the_end():
    assert not broken
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def run(folder: Path, device: str, *options: str) -> str:
    environment = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    environment |= {"FLEXIDEPTH_TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment['PYTHONPATH']}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *options,
        str(folder),
    ]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def test_a_new_worker_goes_on(folder: Path) -> None:
    pytest.importorskip("xdist")
    said = run(folder, "cuda", "-n", "1", "--dist", "load", "--max-worker-restart=5")
    assert "assert 1 == 2" in said and "assert 3 == 4" in said
    assert re.search(r"crashed while running .*test_that_breaks", said)
    assert "3 failed, 4 passed" in said, said


def test_without_workers_or_a_device_nothing_is_ended(folder: Path) -> None:
    said = run(folder, "cuda")
    assert "4 failed, 2 passed" in said, said
    said = run(folder, "", "-n", "1", "--dist", "load")
    assert "4 failed, 2 passed" in said, said
