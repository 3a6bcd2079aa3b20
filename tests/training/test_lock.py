"""One run at a time in a folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flexidepth.errors import SaveError
from flexidepth.training.lock import run_lock

pytest.importorskip("fcntl")

_HOLD = """
import sys, time
from pathlib import Path
from flexidepth.training.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_let_go_of_when_its_process_is_killed(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(SaveError, match=rf"another process is training in {folder}"):
                run_lock(folder).__enter__()
        finally:
            holder.kill()
        holder.wait()
        with run_lock(folder):
            pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    with run_lock(tmp_path):
        pass
