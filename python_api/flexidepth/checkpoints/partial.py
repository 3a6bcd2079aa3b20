"""A partial directory, written in full before it, or its files, take the place of the old ones."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import SaveError


@contextmanager
def partial_directory(target: Path, needed: int, *, inside: bool = False) -> Iterator[Path]:
    """A new directory for what is to be moved to `target`; gone afterwards if it was not moved.

    Args:
        needed: bytes that will be written at least, for the message.
        inside: make it in `target`, not beside it. A rename must not leave the file system, and `target` may
            be where one begins.

    Raises:
        SaveError: no permission, or whatever the system refused while the directory was written and moved.
    """
    partial = _make(target, target if inside else target.parent)
    try:
        yield partial
    except (OSError, SafetensorError) as error:
        if isinstance(error, SaveError):
            raise
        shutil.rmtree(partial, ignore_errors=True)  # before the free space is counted
        free = shutil.disk_usage(target.parent).free
        raise SaveError(
            f"save: writing {target} failed: {error}; at least {needed} bytes are needed, {free} are free "
            "there. What was there before is untouched; free space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make(target: Path, folder: Path) -> Path:
    partial = folder / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise SaveError(
            f"save: cannot write in {folder}: {error.strerror}; choose a directory you may write to"
        ) from error
    return partial


def check_space(target: Path, needed: int) -> None:
    """SaveError where the file system of `target` has no `needed` bytes left."""
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise SaveError(
            f"save: {target} needs at least {needed} bytes, {free} are free there; free space, choose "
            "another directory or a narrower dtype"
        )


def sync(folder: Path) -> None:
    """Have every file on the disk before the rename makes them the checkpoint."""
    for path in (*folder.rglob("*"), folder):
        sync_one(path)


def sync_one(path: Path) -> None:
    """Have one file, or the names in one directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def swap(partial: Path, target: Path) -> None:
    """Move `partial` to `target`; an old directory steps aside first and comes back if that fails."""
    if not target.exists():
        os.rename(partial, target)
        return
    old = partial.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:  # Ctrl-C too
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def swap_files(partial: Path, target: Path, stale: Iterable[str]) -> None:
    """Move the files of `partial` into `target`, where the files that no new one replaces stay.

    The replaced and the `stale` files (names in `target`) step aside into `partial` first, and come back if
    anything fails.
    """
    # The old configuration goes first and the new one comes last: a machine that stops in between leaves no
    # directory that looks whole and is not.
    new = sorted((path.name for path in partial.iterdir()), key=lambda name: name == "config.json")
    old = partial / "old"
    old.mkdir()
    leaving = [
        name for name in reversed(dict.fromkeys([*stale, *new])) if os.path.lexists(target / name)
    ]
    moves = [(target / name, old / name) for name in leaving]
    moves += [(partial / name, target / name) for name in new]
    begun: list[tuple[Path, Path]] = []
    try:
        for move in moves:
            begun.append(move)
            os.rename(*move)
    except BaseException:  # Ctrl-C too
        for source, destination in reversed(begun):
            if not os.path.lexists(source):  # the last one may not have moved
                os.rename(destination, source)
        raise
