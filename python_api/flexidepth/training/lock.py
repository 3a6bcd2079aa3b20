"""One run at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SaveError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "run.lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Within it no other process trains in this folder; the system lets go of it when a process dies.

    Raises:
        SaveError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SaveError(
                    f"training: another process is training in {folder}; wait for its end, stop it, or choose "
                    "another directory"
                ) from error
            except OSError:
                pass  # a file system without locks
        yield
