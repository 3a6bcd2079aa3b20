"""What an evaluation refuses before it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexidepth.errors import SaveError, UnsupportedError, ValueOutOfRangeError
from flexidepth.evaluation import evaluate

from .conftest import Make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skipped": [4]}, r"cannot skip \[4\] layers; this model routes 3"),
        ({"window": 2000}, "window is 2000 tokens; this model has 1024 positions"),
    ],
)
def test_what_does_not_fit_the_model(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=message):
        evaluate(make(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skipped": []}, "wanted numbers of layers"),
        ({"skipped": [-1]}, "wanted numbers of layers"),
        ({"skipped": ["1"]}, "wanted numbers of layers"),
        ({"skipped": [1, 1.0]}, "wanted each number once"),
        ({"methods": ["laco"]}, r"methods \['laco'\]; wanted some of flexidepth, dial, static"),
        ({"also": {"random": "x"}}, "named 'random'; that name is taken"),
        ({"texts": {}}, "neither texts nor tasks"),
        ({"texts": {}, "tasks": Path("x")}, "no text to find thresholds on"),
        ({"tokens": 1}, "tokens is 1; wanted a whole number, 2 or more"),
        ({"limit": 0}, "limit is 0"),
        ({"answers": -1}, "answers is -1"),
    ],
)
def test_options_are_checked(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=message):
        make(**change)


def test_a_model_without_a_tokenizer_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexidepth.checkpoints.source.directory_tokenizer", lambda _: None)
    with pytest.raises(UnsupportedError, match="without a tokenizer"):
        evaluate(make())


def test_a_folder_that_cannot_be_written_is_refused_first(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="file is a file"):
        evaluate(make(model="no such model"), output_dir=tmp_path / "file")
