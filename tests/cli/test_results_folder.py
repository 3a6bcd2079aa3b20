"""Results of one run replace those of another whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexidepth.bench.results_folder import FILES, check_folder, replace_results
from flexidepth.errors import SaveError


def write(folder: Path, text: str, names: tuple[str, ...] = FILES) -> None:
    for name in names:
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of an earlier run beside a file that is none of ours."""
    write(tmp_path, "old", (*FILES, "notes.txt"))
    return tmp_path


def test_new_results_take_the_place_of_all_old_ones(folder: Path, tmp_path: Path) -> None:
    paths = replace_results(folder, lambda new: write(new, "new", ("bench.json", "bench.md")))
    assert [path.name for path in paths] == ["bench.json", "bench.md"]
    # The old plot would show figures that are no more.
    assert content(folder) == {"bench.json": "new", "bench.md": "new", "notes.txt": "old"}
    deep = tmp_path / "a" / "b"
    assert len(replace_results(deep, lambda new: write(new, "new"))) == len(FILES)
    assert content(deep) == dict.fromkeys(FILES, "new")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_writing_that_fails_leaves_the_old_results(folder: Path, error: BaseException) -> None:
    before = content(folder)

    def fail(new: Path) -> None:
        write(new, "new", ("bench.json",))
        raise error

    with pytest.raises(type(error)):
        replace_results(folder, fail)
    assert content(folder) == before


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("names", [FILES, ("bench.json",), ()])
def test_moving_that_fails_is_undone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, names: tuple[str, ...]
) -> None:
    for name in set(FILES) - set(names):
        (folder / name).unlink()
    before, moves, replace = content(folder), 0, os.replace

    def fail_at(source: Path, target: Path) -> None:
        nonlocal moves
        moves += 1
        if moves == at + 1:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", fail_at)
    if at < len(names) + len(FILES):
        with pytest.raises(KeyboardInterrupt):
            replace_results(folder, lambda new: write(new, "new"))
        assert content(folder) == before


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SaveError, match=r"file is a file; wanted a directory"):
            check_folder(folder)
    check_folder(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()
