"""Thresholds and calibration texts of each point and subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexidepth.errors import ValueOutOfRangeError
from flexidepth.evaluation import evaluate

from .conftest import Make, save_tiny, sentence, write_lines


def test_short_files_are_calibrated_on_themselves(make: Make, tmp_path: Path) -> None:
    short = write_lines(tmp_path / "short.jsonl", [{"text": sentence(1, 30)}])
    result = evaluate(make(texts={"short": short}, methods=["flexidepth"], skipped=[1]))
    assert result.header["calibrated_on"].startswith("the measured text itself")
    row = result.rows[-1]
    assert row.skipped == pytest.approx(1, abs=0.02)


def test_too_few_answers_behind_the_measured_part_calibrate_nothing(
    make: Make, tmp_path: Path
) -> None:
    """Tokens enough, of which nearly all are questions."""
    talks = [{"question": sentence(i, 9), "answer": "no"} for i in range(20)]
    asked = write_lines(tmp_path / "asked.jsonl", talks)
    result = evaluate(make(texts={"asked": asked}, methods=["random"], skipped=[1]))
    (each,) = result.header["calibrated_each"]
    assert each["source"].startswith("the measured text itself") and each["tokens"] < 50


def test_each_subject_skips_as_many_layers_as_were_asked_of_it(
    make: Make, tmp_path: Path, tasks: Path
) -> None:
    """Two texts of which one threshold skips unlike numbers; a task, whose questions are its calibration."""
    low = write_lines(tmp_path / "low.jsonl", [{"text": "abcde" * 20} for _ in range(9)])
    high = write_lines(tmp_path / "high.jsonl", [{"text": "VWXYZ" * 20} for _ in range(9)])
    texts = {"low": low, "high": high}
    options = make(texts=texts, tasks=tasks / "words.jsonl", limit=12, calibration_tokens=2000)
    result = evaluate(options)
    own = [r for r in result.rows if r.method == "flexidepth" and r.part != "answers" and r.asked]
    assert len(own) == 6
    for row in own:
        assert row.skipped == pytest.approx(row.asked, abs=0.05)
    point = next(p for p in result.points if (p["method"], p["asked"]) == ("flexidepth", 1))
    offsets = {each["subject"]: each["offset"] for each in point["each"]}
    assert abs(offsets["low"] - offsets["high"]) > 0.05


def test_points_do_not_depend_on_each_other(make: Make, prose: Path) -> None:
    def row(skipped: list[float]) -> str:
        options = make(texts={"prose": prose}, methods=["flexidepth"], skipped=skipped)
        rows = {r.key: r for r in evaluate(options).rows}
        return repr({**rows["text", "flexidepth", 1.5, "prose"].to_dict(), "seconds": 0})

    assert row([1.5]) == row([0.5, 1, 1.5, 2.5])


def test_a_dial_that_is_not_there_or_ends_before_is_said_and_left_out(
    make: Make, prose: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options = make(texts={"prose": prose}, methods=["dial"], skipped=[2.5, 3])
    result = evaluate(options, notify=said.append)
    assert [(r.method, r.asked) for r in result.rows] == [("base", 0), ("dial", 2.5)]
    assert any("dial: target_layers_skipped: 3" in line and "left out" in line for line in said)
    bare = save_tiny(tmp_path / "bare")
    result = evaluate(
        make(model=str(bare), texts={"prose": prose}, methods=["dial"]), notify=said.append
    )
    assert {r.method for r in result.rows} == {"base"}
    assert any("dial: the model has no calibration; left out" in line for line in said)


def test_tasks_alone_take_their_calibration_from_a_file(
    make: Make, tasks: Path, prose: Path
) -> None:
    result = evaluate(make(texts={}, tasks=tasks / "words.jsonl", calibration=prose, skipped=[1]))
    assert {row.part for row in result.rows} == {"task"}
    assert result.header["calibrated_on"] == str(prose)


def test_a_number_that_no_threshold_meets_is_said_and_left_out(
    make: Make, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexidepth.training import calibration

    find = calibration._Search.find

    def unmet(search: Any, target: float) -> Any:
        if target == 1:
            raise ValueOutOfRangeError("calibrate: 1 layers skipped cannot be met")
        return find(search, target)

    monkeypatch.setattr(calibration._Search, "find", unmet)
    said: list[str] = []
    options = make(texts={"prose": prose}, methods=["flexidepth"])
    result = evaluate(options, notify=said.append)
    assert [row.asked for row in result.rows if row.method == "flexidepth"] == [0, 2]
    assert (
        "flexidepth, prose: calibrate: 1 layers skipped cannot be met; that row is left out" in said
    )
