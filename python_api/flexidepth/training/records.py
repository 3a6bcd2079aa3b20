"""Lines of JSON files, blocks of text files and rows of saved datasets, one at a time, each with its place."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, UnsupportedError

Sources = str | Path | Sequence[str | Path]
# A record as it was read, or why there is none; and where it stands ("FILE, line 3").
Found = tuple[str, "dict[str, Any] | DataError"]

_BOM = b"\xef\xbb\xbf"
_BLOCK_CHARACTERS = 2000  # a text file is cut at the first blank line behind as many
_LONGEST_BLOCK = (
    20_000  # and anywhere behind as many, so that a file without blank lines fits memory
)
_WANTED = "a .jsonl file, a .txt file or a directory that datasets' save_to_disk wrote"


def source_paths(sources: Sources) -> list[Path]:
    """The sources as paths, each of a known kind.

    Raises:
        DataError: no source, a path that does not exist, or one of another kind.
    """
    several = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not several:
        raise DataError(f"data: no source; give at least one: {_WANTED}")
    paths = [Path(source) for source in several]
    for path in paths:
        if path.is_dir():
            _check_directory(path)
        elif not path.exists():
            raise DataError(f"{path}: no such file or directory; wanted {_WANTED}")
        elif path.suffix not in (".jsonl", ".txt"):
            raise DataError(f"{path}: a file of kind {path.suffix or 'none'!r}; wanted {_WANTED}")
    return paths


def read_records(paths: Iterable[Path]) -> Iterator[Found]:
    """Every record of the paths in order, broken ones as the DataError that says what is wrong with them."""
    for path in paths:
        if path.is_dir():
            yield from _rows(path)
            continue
        try:
            yield from _json_lines(path) if path.suffix == ".jsonl" else _text_blocks(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _json_lines(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if number == 1:
                line = line.removeprefix(_BOM)
            try:
                yield where, _object(line)
            except UnicodeDecodeError as error:
                yield where, _not_utf8(where, error)
            except json.JSONDecodeError as error:
                problem = f"not valid JSON: {error.msg} at column {error.colno}"
                yield where, DataError(f"{where}: {problem if line.strip() else 'empty'}")
            except (DataError, RecursionError) as error:
                yield where, DataError(f"{where}: {error}")


def _object(line: bytes) -> dict[str, Any]:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}; wanted an object")
    return record


def _text_blocks(path: Path) -> Iterator[Found]:
    """Paragraphs gathered to documents; each has the number of its first line."""
    decode = codecs.getincrementaldecoder("utf-8")()
    block: list[str] = []
    number, first, size = 1, 1, 0
    with path.open("rb") as file:
        if file.read(len(_BOM)) != _BOM:
            file.seek(0)
        # Bounded: what has no line ends at all is read in pieces, too.
        while piece := file.readline(_LONGEST_BLOCK):
            ends = piece.endswith(b"\n")
            try:
                text = decode.decode(piece, final=ends)
            except UnicodeDecodeError as error:
                where = f"{path}, line {number}"
                yield where, _not_utf8(where, error)
                decode.reset()
                text = ""
            if not block:
                first = number
            number += ends
            if text.strip() or block:
                block.append(text)
                size += len(text)
            blank = ends and not text.strip()
            if size > _LONGEST_BLOCK or (blank and size > _BLOCK_CHARACTERS):
                yield f"{path}, line {first}", {"text": "".join(block).strip()}
                block, size = [], 0
        try:
            decode.decode(b"", final=True)
        except UnicodeDecodeError as error:
            where = f"{path}, line {number}"
            yield where, _not_utf8(where, error)
    if rest := "".join(block).strip():
        yield f"{path}, line {first}", {"text": rest}


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{where}: not UTF-8: byte 0x{byte:02x} at byte {error.start + 1} of the line; save it as UTF-8"
    )


def load_saved(path: Path) -> Any:
    """The datasets.Dataset saved at `path`, memory-mapped.

    Raises:
        UnsupportedError: datasets is not installed. DataError: a damaged directory.
    """
    datasets = import_datasets()
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow's, json's and the system's own
        raise DataError(
            f"{path}: not a whole dataset: {error}; write it again with save_to_disk"
        ) from error


def import_datasets() -> Any:
    """The `datasets` package.

    Raises:
        UnsupportedError: it is not installed; names the extra that brings it.
    """
    try:
        import datasets
    except ImportError as error:
        raise UnsupportedError(
            'data: this needs the package datasets; install it with pip install "flexidepth[train]"'
        ) from error
    return datasets


def _rows(path: Path) -> Iterator[Found]:
    for number, row in enumerate(load_saved(path)):
        # A column that this row lacks is there as None.
        yield (
            f"{path}, row {number}",
            {key: value for key, value in row.items() if value is not None},
        )


def _check_directory(path: Path) -> None:
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(p) for p in path.iterdir() if p.is_dir()))
        raise DataError(f"{path}: a dataset of several splits; give those you want: {splits}")
    raise DataError(f"{path}: a directory, but not of a saved dataset; wanted {_WANTED}")
