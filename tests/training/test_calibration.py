"""Calibration: the thresholds that it finds skip as many layers as were wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flexidepth.dial import TOLERANCE, logit
from flexidepth.errors import UnsupportedError, ValueOutOfRangeError
from flexidepth.llm import FlexiDepth
from flexidepth.modeling import FlexiDepthForCausalLM
from flexidepth.training import calibration
from flexidepth.training.calibration import CalibrationPoint, calibrate, calibrate_each
from flexidepth.training.calibration_text import token_sequences
from flexidepth.training.documents import make_document
from flexidepth_ext.engine import Engine

from ..engine.conftest import VOCAB, tiny_config, tiny_model, weights_of


@pytest.fixture(scope="module")
def model() -> FlexiDepthForCausalLM:
    return tiny_model(tiny_config(router_thresholds=[0.4, 0.5, 0.6]))


@pytest.fixture
def llm(model: FlexiDepthForCausalLM) -> Iterator[FlexiDepth]:
    engine = Engine(model.config, weights_of(model), dtype=torch.float32, max_rows=32)
    with FlexiDepth(engine, model.config, None, routers_trained=True, source="test") as made:
        yield made


@pytest.fixture
def texts() -> list[list[int]]:
    lengths = (1, 31, 32, 33, 300, 203)
    return [torch.randint(0, VOCAB, (n,)).tolist() for n in lengths]


def skipped(llm: FlexiDepth, texts: list[list[int]], thresholds: list[float]) -> float:
    """Mean layers skipped a token, by way of scoring."""
    used = [
        llm.score(ids, skip_threshold=thresholds).mean_layers_used * len(ids)
        for ids in texts
        if len(ids) > 1
    ]
    total = sum(len(ids) for ids in texts if len(ids) > 1)
    return 4 - sum(used) / total


def test_thresholds_skip_what_was_wanted(llm: FlexiDepth, texts: list[list[int]]) -> None:
    texts = texts[1:]
    runs: list[tuple[float, float]] = []
    found = calibrate(llm, texts, (0.25, 1, 2, 2.75), on_run=lambda *run: runs.append(run))
    assert [point.wanted for point in found.points] == [0.25, 1, 2, 2.75]
    for point in found.points:
        assert abs(point.layers_skipped - point.wanted) <= TOLERANCE
        assert skipped(llm, texts, point.thresholds) == pytest.approx(point.layers_skipped)
        assert (point.offset, point.layers_skipped) in runs
    assert found.runs == len(runs) <= 9  # gates of one run foretell the next
    assert runs[0][0] == 0.0 and len(set(runs)) == len(runs)
    assert found.tokens == sum(map(len, texts))


def test_all_thresholds_move_by_one_offset_of_their_logits(
    llm: FlexiDepth, texts: list[list[int]]
) -> None:
    for point in calibrate(llm, texts, [0.5, 1.5]).points:
        moved = [
            logit(tau) - logit(start)
            for tau, start in zip(point.thresholds, [0.4, 0.5, 0.6], strict=True)
        ]
        assert moved == pytest.approx([point.offset] * 3, abs=1e-5)


def test_both_ends_can_be_reached(llm: FlexiDepth, texts: list[list[int]]) -> None:
    first, last = calibrate(llm, texts, [0, 3]).points
    assert first.layers_skipped <= TOLERANCE and last.layers_skipped >= 3 - TOLERANCE


def test_a_model_in_training_gets_an_engine_of_its_own(
    model: FlexiDepthForCausalLM, llm: FlexiDepth, texts: list[list[int]], monkeypatch: Any
) -> None:
    closed = []
    close = Engine.close
    monkeypatch.setattr(Engine, "close", lambda self: (closed.append(self), close(self)))
    found = calibrate(model, texts, [1.5], dtype=torch.float32, num_threads=1)
    assert found == calibrate(llm, texts, [1.5])
    assert len(closed) == 1 and closed[0] is not llm.engine


def test_the_usual_targets_go_as_far_as_there_are_layers(
    llm: FlexiDepth, texts: list[list[int]]
) -> None:
    found = calibrate(llm, texts)
    assert [point.wanted for point in found.points] == [0.5, 1.0, 2.0]
    fields = found.config_fields({"half": 1.5, "much": 2.9})
    assert fields["skip_presets"] == {"quality": 2.0, "half": 1.5}
    config = tiny_config(**fields)  # which checks them
    assert [p["layers_skipped"] for p in config.calibration] == [
        round(p.layers_skipped, 4) for p in found.points
    ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([3.5], r"target 3\.5; wanted 0 to 3 layers"),
        ([-1], "target -1; wanted"),
        (["2"], "target '2'; wanted"),
        ([], "wanted one or more"),
        ([2, 1], "ascending"),
        ([1, 1.01], "ascending by more than 0.04"),
    ],
)
def test_targets_that_cannot_be(
    llm: FlexiDepth, texts: list[list[int]], targets: list[Any], message: str
) -> None:
    with pytest.raises(ValueOutOfRangeError, match=message):
        calibrate(llm, texts, targets)


def test_too_little_text_is_said(llm: FlexiDepth) -> None:
    with pytest.raises(ValueOutOfRangeError, match=r"0\.5 layers .* on 1 tokens: .*more text"):
        calibrate(llm, [[7]], [0.5])
    with pytest.raises(ValueOutOfRangeError, match="no text"):
        calibrate(llm, [], [0.5])
    with pytest.raises(ValueOutOfRangeError, match=f"token id {VOCAB}"):
        calibrate(llm, [[VOCAB]], [0.5])
    with pytest.raises(ValueOutOfRangeError, match="1025 tokens; this model has 1024 positions"):
        calibrate(llm, [[1] * 1025], [0.5])


def test_only_what_counts_is_counted(llm: FlexiDepth, texts: list[list[int]]) -> None:
    """Half of each text; the other half is read, and its layers are nobody's business."""
    masks = [[i % 2 == 0 for i in range(len(ids))] for ids in texts]
    found = calibrate(llm, texts, [1.5], counted=masks)
    assert found.tokens == sum(map(sum, masks))
    (point,) = found.points
    skipped = 0
    for ids, mask in zip(texts, masks, strict=True):
        cache, taus = llm.engine.new_cache(len(ids)), torch.tensor(point.thresholds)
        ran = [
            llm.engine.forward(chunk, [len(chunk)], [cache], thresholds=taus).ran.clone()
            for chunk in torch.split(torch.tensor(ids, dtype=torch.int32), 32)
        ]
        skipped += int((torch.cat(ran)[torch.tensor(mask)] == 0).sum())
    assert skipped / found.tokens == pytest.approx(point.layers_skipped)


def test_masks_that_do_not_fit(llm: FlexiDepth) -> None:
    with pytest.raises(ValueOutOfRangeError, match=r"counted has \[1\] values .* of \[2\] tokens"):
        calibrate(llm, [[1, 2]], [0.5], counted=[[True]])
    with pytest.raises(ValueOutOfRangeError, match="no token counts"):
        calibrate(llm, [[1, 2]], [0.5], counted=[[False, False]])


def test_of_conversations_the_answers_count(tokenizer: Any) -> None:
    talk = make_document(
        {
            "messages": [
                {"role": "user", "content": "hello 123"},
                {"role": "assistant", "content": "it's"},
            ]
        },
        "here",
    )
    plain = make_document({"text": "hello"}, "there")
    found = token_sequences([talk, plain], tokenizer, tokens=1000, length=1000)
    answer = [i for i, counts in zip(found[0].ids, found[0].counted, strict=True) if counts]
    assert tokenizer.decode(answer).strip().startswith("it's")
    assert len(answer) < len(found[0].ids) / 2
    assert all(found[1].counted)
    cut = token_sequences([talk, plain], tokenizer, tokens=len(found[0].ids) + 1, length=4)
    assert [token for s in cut for token in s.ids] == [*found[0].ids, found[1].ids[0]]
    assert [counts for s in cut for counts in s.counted] == [*found[0].counted, True]


def test_a_model_without_routers(texts: list[list[int]]) -> None:
    plain = tiny_model(tiny_config(routing_layers=[]))
    with pytest.raises(UnsupportedError, match="routes no layer"):
        calibrate(plain, texts)


def test_gates_that_mislead_are_overcome_by_bisection(
    llm: FlexiDepth, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration._Search, "guess", lambda *_: -39.0)
    (point,) = calibrate(llm, texts, [1.5]).points
    assert abs(point.layers_skipped - 1.5) <= TOLERANCE


def test_what_is_found_alone_depends_on_no_other_target(
    llm: FlexiDepth, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runs = calibration._Search.run, []

    def counted(search: Any, offset: float) -> None:
        runs.append(offset)
        run(search, offset)

    monkeypatch.setattr(calibration._Search, "run", counted)
    targets = (0.25, 1, 2, 2.75)
    together = calibrate_each(llm, texts, targets)
    assert len(runs) <= 9  # each by itself from the beginning takes 11
    assert calibrate_each(llm, texts, reversed(targets)) == together
    for target in targets:
        assert calibrate_each(llm, texts, [target]) == {target: together[target]}
        point = together[target]
        assert isinstance(point, CalibrationPoint)
        assert abs(point.layers_skipped - target) <= TOLERANCE


def test_a_target_that_cannot_be_met_stops_no_other(llm: FlexiDepth) -> None:
    found = calibrate_each(llm, [[7, 8]], [0, 0.3])
    point, error = found[0], found[0.3]
    assert isinstance(point, CalibrationPoint) and point.layers_skipped == 0
    assert isinstance(error, ValueOutOfRangeError) and "0.3 layers skipped cannot be met" in str(
        error
    )


def test_texts_that_share_a_call_count_as_alone(
    llm: FlexiDepth, model: FlexiDepthForCausalLM
) -> None:
    """Whatever an engine call holds: one text, several, or a part of one."""
    texts = [torch.randint(0, VOCAB, (n,)).tolist() for n in (5, 9, 20, 70, 3, 4)]
    found = calibrate(llm, texts, [1.5])
    for rows in (5, 1024):
        engine = Engine(model.config, weights_of(model), dtype=torch.float32, max_rows=rows)
        with FlexiDepth(engine, model.config, None, routers_trained=True, source="test") as other:
            assert calibrate(other, texts, [1.5]) == found
