"""The figures of an evaluation hold its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexidepth.errors import CheckpointError
from flexidepth.plots import kinds_figure, quality_figure, save_figure


def text_row(method: str, subject: str, skipped: float, ratio: float | None) -> dict[str, Any]:
    return {
        "part": "text",
        "method": method,
        "subject": subject,
        "skipped": skipped,
        "ratio": ratio,
        "bytes_per_token": 1e6 * (100 - 10 * skipped),
    }


def kind_row(method: str, kind: str, rates: list[float]) -> dict[str, Any]:
    return {
        "part": "kind",
        "method": method,
        "subject": kind,
        "run_rates": rates,
        "routing_layers": [2, 3],
        "answer_layers": 2 + sum(rates),
    }


RESULT: dict[str, Any] = {
    "format": "flexidepth-eval-1",
    "model": "a $model$",
    "num_layers": 4,
    "rows": [
        text_row("base", "prose", 0, 1.0),
        text_row("flexidepth", "prose", 2.1, 1.5),
        text_row("flexidepth", "prose", 0.9, 1.2),
        text_row("random", "prose", 1, 3.0),
        text_row("random", "prose", 2, None),
        text_row("flexidepth", "code", 1, 1.1),
        kind_row("flexidepth", "copy", [0.25, 1.0]),
        kind_row("flexidepth", "product", [0.5, 0.75]),
        kind_row("wide", "copy", [0.0, 1.0]),
        kind_row("wide", "silent", []),
    ],
}


def test_a_panel_for_each_set_a_line_for_each_method(tmp_path: Path) -> None:
    figure = quality_figure(RESULT)
    prose, weights, code, _ = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in prose.lines}
    assert lines["flexidepth"] == [[0.9, 1.2], [2.1, 1.5]]
    assert lines["random"] == [[1, 3.0]]  # what overflowed has no place
    assert lines["base"] == [[0, 1.0]]
    by_weights = {line.get_label(): line.get_xydata().tolist() for line in weights.lines}
    assert by_weights["flexidepth"] == [[79.0, 1.5], [91.0, 1.2]]
    assert weights.xaxis_inverted()  # what is faster stands on the right
    assert prose.get_yscale() == code.get_yscale() == "log"
    assert prose.get_title() == "prose"
    assert save_figure(figure, tmp_path / "eval.png").stat().st_size > 1000


def test_a_heat_map_for_each_model(tmp_path: Path) -> None:
    figure = kinds_figure(RESULT)
    first, second = figure.axes[:2]
    assert np.array_equal(first.images[0].get_array(), [[0.25, 1.0], [0.5, 0.75]])
    assert np.array_equal(second.images[0].get_array(), [[0.0, 1.0]])
    labels = [label.get_text() for label in first.get_yticklabels()]
    assert labels == ["copy  (3.2 layers)", "product  (3.2 layers)"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["2", "3"]
    save_figure(figure, tmp_path / "kinds.svg")


@pytest.mark.parametrize("figure", [quality_figure, kinds_figure])
@pytest.mark.parametrize(
    "result", [{}, {"rows": 3}, {"rows": [{}]}, {"rows": [{"part": "text"}, {"part": "kind"}]}]
)
def test_anything_else_is_refused(figure: Any, result: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not an evaluation"):
        figure(result)


@pytest.mark.parametrize("figure", [quality_figure, kinds_figure])
def test_nothing_to_draw(figure: Any) -> None:
    with pytest.raises(CheckpointError, match="the evaluation has no"):
        figure({**RESULT, "rows": []})
