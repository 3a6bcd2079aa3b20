"""Work on a device in a process of its own.

After some errors (an illegal address, say) every later CUDA call of a process fails, and a kernel may never end. Apart,
that is the end of one process, and what it had sent until then is here.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from .told import told

Send = Callable[[Any], object]
Work = Callable[..., object]  # its last argument is a Send
Way = Callable[..., str]  # `here` or `apart`
_END_SECONDS = 5.0  # that a process has to end, when its work is done and when it is killed


def here(
    work: Work,
    arguments: tuple[Any, ...],
    take: Send,
    seconds: float = math.inf,
    quiet: float = math.inf,
) -> str:
    """Call work(*arguments, send) in this process, for what cannot be sent to another one; `take` gets what it sends,
    as it comes. Nothing ends it: seconds are not counted.

    Returns:
        What stopped it, or "".
    """
    try:
        work(*arguments, take)
    except Exception as error:
        return told(error)
    return ""


def apart(
    work: Work,
    arguments: tuple[Any, ...],
    take: Send,
    seconds: float = math.inf,
    quiet: float = math.inf,
) -> str:
    """The same in a new process, which is ended with all that it started where it takes more than `seconds`, or has
    sent nothing for `quiet` seconds.

    work and arguments are pickled, and so is what is sent.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, arguments, sending))
    try:
        process.start()
        sending.close()
        return _listen(process, receiving, take, seconds, quiet)
    finally:  # Ctrl-C too
        receiving.close()
        _end(process)


class _Ended:
    """The last message. said: what stopped the work, or ""."""

    def __init__(self, said: str) -> None:
        self.said = said


def _child(work: Work, arguments: tuple[Any, ...], sending: Connection) -> None:
    os.setpgrp()  # what it starts ends with it
    said = here(work, arguments, sending.send)
    sending.send(_Ended(said))


def _listen(
    process: BaseProcess, receiving: Connection, take: Send, seconds: float, quiet: float
) -> str:
    begin = last = time.monotonic()
    while True:
        now = time.monotonic()
        left = min(begin + seconds, last + quiet) - now
        if left <= 0 and not receiving.poll():  # what has come counts, however late it is taken
            if now >= begin + seconds:
                return f"stopped: took more than {seconds:.0f} s"
            return f"stopped: nothing came of it for {quiet:.0f} s"
        # Not the pipe alone: what a process started may hold it open when that process is gone.
        wait([receiving, process.sentinel], None if left == math.inf else max(left, 0.0))
        if receiving.poll():
            try:
                message = receiving.recv()
            except (EOFError, OSError):  # also in the middle of a message
                return _death(process)
            if isinstance(message, _Ended):
                process.join(_END_SECONDS)
                return message.said
            take(message)
            last = time.monotonic()
        elif not process.is_alive():
            return _death(process)


def _death(process: BaseProcess) -> str:
    process.join(_END_SECONDS)
    status = process.exitcode
    if status is not None and status < 0:
        with suppress(ValueError):
            return f"stopped: its process was ended by {signal.Signals(-status).name}"
    return f"stopped: its process ended with status {status}"


def _end(process: BaseProcess) -> None:
    """Whatever is left of it and of what it started."""
    if process.pid is None:  # it was never there
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():  # before it had a group
        process.kill()
    process.join(_END_SECONDS)
    if process.is_alive():  # a driver keeps it: the end of this process does not wait for it
        children: set[BaseProcess] = multiprocessing.process._children  # type: ignore[attr-defined]
        children.discard(process)
