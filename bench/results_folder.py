"""A folder of results that holds one run or another, never a mixture."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from flexidepth.errors import SaveError

# Every file a benchmark may write. One that a new run does not write goes too: it would belong to the run before.
FILES = (
    *("bench.json", "bench.jsonl", "bench.csv", "bench.md"),
    *("decode.svg", "prompt.svg", "breakdown.svg"),
)
PARTIAL = "bench.partial.jsonl"  # rows of a run that goes on, or was interrupted


def check_folder(folder: Path) -> None:
    """SaveError where results could not be written: better now than after minutes of measuring."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise SaveError(
            f"results: {nearest} is a file; wanted a directory for results; choose another"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SaveError(f"results: {nearest} cannot be written to; choose another directory")


def replace_results(
    folder: Path, write: Callable[[Path], None], files: Sequence[str] = FILES
) -> list[Path]:
    """Let `write` fill an empty directory with `files`, then exchange them for those in `folder`.

    Whatever goes wrong on the way (no space, Ctrl-C, an error of `write`), `folder` keeps what it had. Files of
    other names in it are not touched.

    Returns:
        The paths written.
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder, so that moving is a rename on one file system.
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        new, old = staging / "new", staging / "old"
        new.mkdir()
        old.mkdir()
        write(new)
        _exchange(folder, new, old, files)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [folder / name for name in files if (folder / name).exists()]


def _exchange(folder: Path, new: Path, old: Path, files: Sequence[str]) -> None:
    """Move the old files out and the new ones in; all of it is undone where one cannot be moved."""
    moves = [(folder / name, old / name) for name in files]
    moves += [(new / name, folder / name) for name in files]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            if source.exists():
                done.append((source, target))
                os.replace(source, target)
    except BaseException:  # Ctrl-C too
        for source, target in reversed(done):
            if not source.exists():
                os.replace(target, source)
        raise
