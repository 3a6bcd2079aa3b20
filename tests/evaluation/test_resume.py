"""Evaluations that were interrupted: rows that are kept, gone on with, or not taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexidepth.evaluation import EvalResult, evaluate, measure
from flexidepth.evaluation.record import PARTIAL

from .conftest import Make, save_tiny


def test_an_interrupted_run_goes_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(make())
    trace, calls = measure.trace_windows, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return trace(*arguments)

    monkeypatch.setattr(measure, "trace_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(make(), output_dir=tmp_path)
    kept = json.loads((tmp_path / PARTIAL).read_text())["rows"]
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL] and 3 < len(kept) < 20
    monkeypatch.setattr(measure, "trace_windows", trace)
    said: list[str] = []
    result = evaluate(make(num_threads=2), output_dir=tmp_path, notify=said.append)
    assert said[0] == f"{len(kept)} rows of an interrupted run are kept"
    assert not (tmp_path / PARTIAL).exists()

    def figures(result: EvalResult) -> dict[Any, Any]:
        return {r.key: repr({**r.to_dict(), "seconds": 0}) for r in result.rows}

    assert figures(result) == figures(whole)
    assert result.rows[0].seconds == kept[0]["seconds"]  # not measured again
    assert len(result.points) == len(whole.points)


def test_an_interrupted_run_compares_with_the_same_base_model(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted once only the ablated model is left, which is computed by another program than the others."""
    ablated = save_tiny(tmp_path / "ablated", ablations=["no_adapter"], gate="straight_through")
    options = make(also={"ablated": str(ablated)}, methods=["random"], skipped=[1, 2])
    whole = evaluate(options)
    add = measure.Record.add

    def interrupted(record: Any, row: Any) -> None:
        add(record, row)
        if row.method == "ablated":
            raise KeyboardInterrupt

    monkeypatch.setattr(measure.Record, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, output_dir=tmp_path / "out")
    monkeypatch.setattr(measure.Record, "add", add)
    told: list[Any] = []
    trace, answer = measure.trace_windows, measure.answer_prompts

    def traced(engine: Any, *rest: Any) -> Any:
        told.append((type(engine).__name__, rest[-1].method))
        return trace(engine, *rest)

    def answered(llm: Any, *rest: Any) -> Any:
        told.append((type(llm.engine).__name__, rest[1].method))
        return answer(llm, *rest)

    monkeypatch.setattr(measure, "trace_windows", traced)
    monkeypatch.setattr(measure, "answer_prompts", answered)
    result = evaluate(options, output_dir=tmp_path / "out")
    computed = [engine for engine, method in told if method == "base"]
    assert computed == ["Engine"] * 3  # two texts and the answers
    figures, others = (
        {r.key: repr({**r.to_dict(), "seconds": 0}) for r in made.rows} for made in (result, whole)
    )
    assert figures == others


@pytest.mark.parametrize("change", [{"tokens": 150}, {"dtype": "bfloat16"}, {"seed": 1}])
def test_rows_of_other_options_are_not_taken_but_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    options = make(methods=["random"], answers=0)
    monkeypatch.setattr("flexidepth.evaluation.record.Record.discard", lambda _: None)
    evaluate(options, output_dir=tmp_path)
    before = (tmp_path / PARTIAL).read_bytes()
    number = len(json.loads(before)["rows"])
    said: list[str] = []
    evaluate(make(methods=["random"], answers=0, **change), output_dir=tmp_path, notify=said.append)
    (name,) = change
    aside = tmp_path / "eval.partial.1.json"
    other = f"is of a run with other {name}; its {number} rows are kept as {aside}"
    assert said[0] == f"{tmp_path / PARTIAL} {other}"
    assert aside.read_bytes() == before
    evaluate(options, output_dir=tmp_path)
    assert (tmp_path / "eval.partial.2.json").exists() and aside.read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", '{"identity": 1}', "null", '{"identity": {}}'])
def test_a_damaged_record_is_measured_anew(make: Make, tmp_path: Path, content: str) -> None:
    (tmp_path / PARTIAL).write_text(content)
    said: list[str] = []
    options = make(methods=["random"], skipped=[1], answers=0)
    result = evaluate(options, output_dir=tmp_path, notify=said.append)
    assert len(result.rows) == 4
    assert "is no record of a run" in said[0] and "eval.partial.1.json" in said[0]
    assert (tmp_path / "eval.partial.1.json").read_text() == content
