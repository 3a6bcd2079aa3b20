"""From a wanted number of layers to thresholds."""

from __future__ import annotations

import math

import pytest

from flexidepth import FlexiDepth
from flexidepth.errors import ValueOutOfRangeError
from flexidepth.evaluation.thresholds import TOLERANCE, ThresholdFinder, turn_thresholds


@pytest.mark.parametrize("wanted", [0.5, 1, 1.7, 2.5])
def test_calibration_text_skips_what_is_wanted(
    llm: FlexiDepth, windows: list[list[int]], wanted: float
) -> None:
    dial = ThresholdFinder(llm.engine, windows).find(wanted)
    scores = llm.score(windows, skip_threshold=dial.thresholds)
    tokens = sum(map(len, windows))
    used = sum(s.mean_layers_used * len(w) for s, w in zip(scores, windows, strict=True)) / tokens
    assert 4 - used == pytest.approx(dial.skipped)
    assert abs(dial.skipped - wanted) <= TOLERANCE
    assert dial.offset is not None
    assert dial.thresholds == turn_thresholds(llm.config.router_thresholds, dial.offset)


def test_the_ends_need_no_search(llm: FlexiDepth, windows: list[list[int]]) -> None:
    finder = ThresholdFinder(llm.engine, windows)
    assert finder.find(0).thresholds == [0, 0, 0]
    assert finder.find(3).thresholds == [1, 1, 1]
    for wrong in (-1, 3.5):
        with pytest.raises(ValueOutOfRangeError, match=f"{wrong} layers to skip.*0 to 3"):
            finder.find(wrong)
    with pytest.raises(ValueOutOfRangeError, match="on 0 windows"):
        ThresholdFinder(llm.engine, []).find(1)


def test_the_order_of_searches_changes_nothing(llm: FlexiDepth, windows: list[list[int]]) -> None:
    finder = ThresholdFinder(llm.engine, windows)
    finder.find(2)
    assert finder.find(1) == ThresholdFinder(llm.engine, windows).find(1)


def test_thresholds_move_together_on_the_logit_scale() -> None:
    turned = turn_thresholds([0.5, 0.2, 0.0, 1.0], 1.5)
    assert turned[0] == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert math.log(turned[1] / (1 - turned[1])) == pytest.approx(math.log(0.25) + 1.5)
    assert turned[2:] == [0, 1]
