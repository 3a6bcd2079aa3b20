"""Work in a process of its own: what it sends is there, whatever becomes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.gpu import isolated
from bench.gpu.isolated import Send, Way, apart, here


def sends(what: list[int], send: Send) -> None:
    """Each by itself."""
    for one in what:
        send(one)


def fails(send: Send) -> None:
    send(1)
    raise ValueError("a | b")


def dies(how: int, send: Send) -> None:
    send(os.getpid())
    os.kill(os.getpid(), how)


def leaves(send: Send) -> None:
    send(1)
    os._exit(3)


def hangs(send: Send) -> None:
    """And something it started does."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    send(child.pid)
    time.sleep(300)


@pytest.mark.parametrize("way", [here, apart])
def test_what_is_sent_comes_in_its_order(way: Way) -> None:
    got: list[int] = []
    assert way(sends, ([1, 2, 3],), got.append) == "" and got == [1, 2, 3]


@pytest.mark.parametrize("way", [here, apart])
def test_an_exception_is_told(way: Way) -> None:
    got: list[int] = []
    assert way(fails, (), got.append) == "stopped: ValueError: a / b" and got == [1]


def test_what_has_come_counts_however_late_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a figure of the first result takes longer than all of the work may."""
    got: list[int] = []
    clock = [0.0]
    monkeypatch.setattr(isolated, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(one: int) -> None:
        got.append(one)
        time.sleep(0.5)
        clock[0] += 1000.0

    assert apart(sends, ([1, 2, 3],), slow, 10.0) == "" and got == [1, 2, 3]


def test_a_process_that_dies_is_told() -> None:
    got: list[int] = []
    said = apart(dies, (signal.SIGKILL,), got.append)
    assert said == "stopped: its process was ended by SIGKILL"
    assert len(got) == 1 and got != [os.getpid()]
    assert apart(leaves, (), got.append) == "stopped: its process ended with status 3"
    assert got[1:] == [1]


def test_what_takes_too_long_is_ended_with_all_that_it_started() -> None:
    got: list[int] = []
    begin = time.monotonic()
    said = apart(hangs, (), got.append, 15.0)
    assert said == "stopped: took more than 15 s" and time.monotonic() - begin < 60
    (pid,) = got
    for _ in range(100):
        if not running(pid):
            break
        time.sleep(0.1)
    assert not running(pid)


def test_what_sends_nothing_for_too_long_is_ended() -> None:
    got: list[int] = []
    said = apart(hangs, (), got.append, 300.0, 15.0)
    assert said == "stopped: nothing came of it for 15 s" and len(got) == 1


def test_what_is_wrong_here_ends_it_too() -> None:
    pids: list[int] = []

    def take(pid: Any) -> None:
        pids.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart(hangs, (), take)
    time.sleep(0.5)
    assert not running(pids[0])


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
