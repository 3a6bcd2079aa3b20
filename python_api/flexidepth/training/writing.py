"""JSON lines on the disk: a file that is whole or not there, and one that goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from ..errors import SaveError

_BLOCK = 1 << 16


def json_line(record: Any) -> str:
    """The record as one line of JSON, its end included."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def write_lines(path: Path, records: Iterable[Any], *, overwrite: bool = False) -> None:
    """Write the records as a new file in one step.

    Raises:
        SaveError: the file exists (without overwrite), or cannot be written; what was there stays.
    """
    if path.exists() and not overwrite:
        raise SaveError(f"{path}: exists; choose another name, or --overwrite to replace it")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.writelines(json_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise SaveError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def last_whole_line(path: Path) -> bytes | None:
    """The last line that has an end, without that end; None where there is none."""
    with path.open("rb") as file:
        end = _end_of_last_line(file)
        if end == 0:
            return None
        begin = _end_of_last_line(file, end - 1)
        file.seek(begin)
        return file.read(end - 1 - begin)


def open_to_append(path: Path) -> IO[str]:
    """The file, made if need be, with a line at its end that was not written to its end cut off."""
    with path.open("a+b") as file:
        file.truncate(_end_of_last_line(file))
    return path.open("a", encoding="utf-8")


def _end_of_last_line(file: IO[bytes], before: int | None = None) -> int:
    """Bytes up to and with the last end of a line, of the first `before` bytes."""
    end = file.seek(0, os.SEEK_END) if before is None else before
    while end > 0:
        begin = max(0, end - _BLOCK)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + at + 1
        end = begin
    return 0
