"""The dial: presets and numbers of layers become thresholds, in every call and while loading."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from flexidepth.checkpoints import open_checkpoint, save_checkpoint
from flexidepth.dial import calibrated_thresholds, check_dial, reached_presets
from flexidepth.errors import UnsupportedError, ValueOutOfRangeError
from flexidepth.llm import FlexiDepth
from flexidepth.training.calibration import calibrate

from ..checkpoints.tiny import save_base
from ..engine.conftest import tiny_config

LAYERS = [1, 2, 3]
POINTS = [
    {"layers_skipped": 0.5, "thresholds": [0.2, 0.1, 0.0]},
    {"layers_skipped": 1.5, "thresholds": [0.5, 0.5, 0.5]},
    {"layers_skipped": 2.5, "thresholds": [0.9, 0.8, 1.0]},
]
PRESETS = {"balanced": 1.5, "fast": 2.0, "quality": 0.5}
PROMPT = [5, 60, 7, 99, 12]


@pytest.fixture
def dialled(llm: FlexiDepth) -> FlexiDepth:
    llm.config = tiny_config(
        **{**llm.config.to_dict(), "calibration": POINTS, "skip_presets": PRESETS}
    )
    return llm


def odds(tau: float) -> float:
    return math.log(tau / (1 - tau))


def test_between_two_points_thresholds_are_interpolated_along_their_logits() -> None:
    taus = calibrated_thresholds(POINTS, 1.25)
    assert odds(taus[0]) == pytest.approx(0.25 * odds(0.2))
    assert odds(taus[1]) == pytest.approx(0.25 * odds(0.1))
    assert odds(taus[2]) == pytest.approx(0.25 * odds(1e-30))
    taus = calibrated_thresholds(POINTS, 2.0)
    assert odds(taus[0]) == pytest.approx(0.5 * odds(0.9))
    assert odds(taus[2]) == pytest.approx(0.5 * odds(1 - 1e-6))


def test_points_are_met_as_they_are() -> None:
    for point in POINTS:
        assert calibrated_thresholds(POINTS, point["layers_skipped"]) == point["thresholds"]
    # A calibration comes near what was wanted: 2.5 may be kept as 2.49.
    assert calibrated_thresholds(POINTS, 2.515) == POINTS[2]["thresholds"]
    assert calibrated_thresholds(POINTS, 0.485) == POINTS[0]["thresholds"]
    assert calibrated_thresholds(POINTS[:1], 0.5) == POINTS[0]["thresholds"]


@pytest.mark.parametrize("target", [0.4, 2.6, -1, math.nan, math.inf, True, "2", None])
def test_a_target_outside_the_calibrated_range(target: Any) -> None:
    with pytest.raises(
        ValueOutOfRangeError, match=r"target_layers_skipped: .* 0\.50 to 2\.50 layers"
    ):
        calibrated_thresholds(POINTS, target)


def test_presets_that_are_out_of_reach_are_left_out() -> None:
    assert reached_presets(POINTS) == {"quality": 2.0}
    points = [{"layers_skipped": n, "thresholds": [0.5] * 8} for n in (1.0, 5.985)]
    assert reached_presets(points) == {"quality": 2.0, "balanced": 4.0, "fast": 6.0}
    assert reached_presets([]) == {}


@pytest.mark.parametrize(
    ("points", "presets", "message"),
    [
        ({}, {}, r"calibration is \{\}; wanted a list"),
        ([3], {}, "point 0 is 3; wanted"),
        ([{"layers_skipped": 1.0}], {}, "point 0 is"),
        ([{**POINTS[0], "more": 1}], {}, "point 0 is"),
        ([{**POINTS[0], "layers_skipped": 3.5}], {}, r"skips 3\.5 layers; wanted 0 to 3"),
        ([{**POINTS[0], "layers_skipped": "1"}], {}, "skips '1' layers"),
        ([{**POINTS[0], "layers_skipped": math.nan}], {}, "skips nan layers"),
        ([{**POINTS[0], "thresholds": 0.5}], {}, r"thresholds 0\.5; wanted a list"),
        ([{**POINTS[0], "thresholds": [0.5]}], {}, "1 values; this model routes 3"),
        ([{**POINTS[0], "thresholds": [0.5, 2, 0]}], {}, r"value 1 \(layer 2\) is 2"),
        ([POINTS[1], POINTS[0]], {}, r"are \[1\.5, 0\.5\]; wanted them ascending"),
        ([POINTS[0], POINTS[0]], {}, "ascending"),
        (POINTS, [], r"skip_presets is \[\]"),
        (POINTS, {"fast": 3.0}, r"'fast' is 3\.0; .*0\.50 to 2\.50 layers"),
        (POINTS, {"fast": "2"}, "'fast' is '2'"),
        (POINTS, {3: 2.0}, r"3 is 2\.0; wanted a name"),
        ([], {"fast": 2.0}, "there is no calibration"),
    ],
)
def test_a_configuration_with_a_wrong_dial(points: Any, presets: Any, message: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=message):
        check_dial(points, presets, LAYERS)
    with pytest.raises(ValueOutOfRangeError, match=message):
        tiny_config(calibration=points, skip_presets=presets)


def test_a_configuration_keeps_its_dial(tmp_path) -> None:
    config = tiny_config(calibration=POINTS, skip_presets=PRESETS)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert (again.calibration, again.skip_presets) == (POINTS, PRESETS)
    assert (tiny_config().calibration, tiny_config().skip_presets) == ([], {})
    with pytest.raises(ValueOutOfRangeError, match="did you mean 'skip_presets'"):
        tiny_config(skip_preset={})


def test_every_call_takes_a_preset_or_a_number(dialled: FlexiDepth) -> None:
    taus = calibrated_thresholds(POINTS, 2.0)
    settings: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": -1, "return_routing": True}
    want = dialled.generate(PROMPT, skip_threshold=taus, **settings)
    plain = dialled.generate(PROMPT, **settings)
    assert not torch.equal(plain.routing.ran, want.routing.ran)
    number = np.float32(2.0)
    for arguments in ({"skip": "fast"}, {"target_layers_skipped": number}):
        got = dialled.generate(PROMPT, **arguments, **settings)
        assert torch.equal(got.routing.gates, want.routing.gates)
        assert [
            c.token_id for c in dialled.stream(PROMPT, **arguments, **settings)
        ] == want.token_ids
        score = dialled.score(PROMPT, **arguments)
        assert torch.equal(score.logprobs, dialled.score(PROMPT, skip_threshold=taus).logprobs)
        assert dialled.loglikelihood("ab", "cd", **arguments) == dialled.loglikelihood(
            "ab", "cd", skip_threshold=taus
        )


def test_forced_routing_goes_first_as_over_a_threshold(dialled: FlexiDepth) -> None:
    forced = dialled.score(PROMPT, force_routing="all")
    assert torch.equal(
        dialled.score(PROMPT, force_routing="all", skip="fast").logprobs, forced.logprobs
    )


def test_a_turn_says_it_in_another_way_than_the_conversation(dialled: FlexiDepth) -> None:
    chat = dialled.chat(skip="quality", max_new_tokens=3, eos_token_id=-1)
    used = [
        chat.send("hi", **arguments).metrics.mean_layers_used
        for arguments in ({"target_layers_skipped": 2.5}, {"skip_threshold": 1.0}, {})
    ]
    assert used[1] == 1
    assert used[2] > used[0]
    assert len(list(chat.stream("hi", skip_threshold=0.0))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip": "fast", "skip_threshold": 0.5}, r"skip_threshold=0\.5 and skip='fast'; give one"),
        ({"skip": "fast", "target_layers_skipped": 2}, "give one of them"),
        ({"skip_threshold": 0.5, "target_layers_skipped": 2}, "give one of them"),
        ({"skip": "all-layers"}, "no preset 'all-layers'; this model has: quality, balanced, fast"),
        ({"skip": "balance"}, "did you mean 'balanced'"),
        ({"skip": 2.0}, r"no preset 2\.0; .*target_layers_skipped takes any number"),
        ({"target_layers_skipped": 2.6}, r"2\.6; this model is calibrated for 0\.50 to 2\.50"),
        ({"target_layers_skipped": "fast"}, "'fast'; this model is calibrated"),
    ],
)
def test_what_is_no_position_of_the_dial(
    dialled: FlexiDepth, arguments: dict[str, Any], message: str
) -> None:
    for call in (dialled.generate, dialled.score, lambda *a, **k: list(dialled.stream(*a, **k))):
        with pytest.raises(ValueOutOfRangeError, match=message):
            call(PROMPT, **arguments)
    assert dialled.generate(PROMPT, max_new_tokens=1).token_ids  # still usable


@pytest.mark.parametrize("arguments", [{"skip": "fast"}, {"target_layers_skipped": 2.0}])
def test_without_a_calibration_the_command_that_makes_one_is_named(
    llm: FlexiDepth, arguments: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedError, match=r"not calibrated.*`flexidepth calibrate MODEL"):
        llm.generate(PROMPT, **arguments)


def test_a_preset_while_loading_holds_for_every_call(tmp_path) -> None:
    save_base(tmp_path / "base")
    opened = open_checkpoint(tmp_path / "base")
    texts = [torch.randint(0, 320, (100,)).tolist() for _ in range(4)]
    with FlexiDepth.from_pretrained(tmp_path / "base", dtype="float32", num_threads=1) as llm:
        fields = calibrate(llm, texts, [0.5, 1, 1.5]).config_fields({"half": 1.0})
    config = type(opened.config)(**{**opened.config.to_dict(), **fields})
    path = save_checkpoint(config, opened.tensors(), tmp_path / "whole")

    def skipped(**arguments: Any) -> float:
        with FlexiDepth.from_pretrained(path, dtype="float32", num_threads=1, **arguments) as llm:
            assert llm.config.calibration == config.calibration
            scores = llm.score(texts)
            return 4 - sum(score.mean_layers_used for score in scores) / len(texts)

    assert skipped(skip="half") == pytest.approx(1, abs=0.021)
    assert skipped(target_layers_skipped=1.5) == pytest.approx(1.5, abs=0.021)
    assert skipped() != pytest.approx(1.5, abs=0.1)
    with pytest.raises(ValueOutOfRangeError, match="give one of them"):
        skipped(skip="half", routing={"router_thresholds": 0.5})
    # What was measured with another gate says nothing about this one.
    assert open_checkpoint(path, routing={"gate": "multiplier"}).config.calibration
    other = open_checkpoint(path, routing={"gate": "straight_through"}).config
    assert (other.calibration, other.skip_presets) == ([], {})
