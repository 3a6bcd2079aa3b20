"""Decoding and prompts on the CPU: exact skips, rows, sequences side by side."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
import torch

from flexidepth import FlexiDepth
from flexidepth.bench.decode import decode_case, measure_decode
from flexidepth.bench.ideal import bytes_per_token, flops_of_prompt, ideal_speedup, step_bytes
from flexidepth.bench.plans import dense_plan, make_plans
from flexidepth.bench.prompt import measure_prompt
from flexidepth.bench.report import DECODE_COLUMNS, csv_text, markdown, table, tables
from flexidepth.bench.timing import Case
from flexidepth.errors import OutOfMemoryError


def test_decode_skips_exactly_what_is_asked(model: str) -> None:
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        engine, seen = llm.engine, []
        forward = engine.forward

        def spy(*arguments: Any, **options: Any) -> Any:
            result = forward(*arguments, **options)
            if len(arguments[0]) == 1:
                seen.append((options["routing"], result.ran.sum().item()))
            return result

        engine.forward = spy
        for skipped in (None, 0, 1, 2):
            config = llm.config
            plan = dense_plan() if skipped is None else make_plans("random", [skipped], config)[0]
            case = decode_case(engine, plan, batch=1, depth=4, steps=3)
            case.start()
            for _ in range(3):
                case.step()
    wanted = [("dense", 2)] * 3
    wanted += [("forced_hard", ran) for ran in (2, 1, 0) for _ in range(3)]
    assert seen == wanted


def test_rows_of_a_measurement(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    peer = Case("peer", lambda: None)
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        plans = make_plans("random", [0, 2], llm.config)
        rows = measure_decode(
            llm.engine, plans, peers=[peer], depth=4, rounds=2, steps=6, bandwidth=10.0
        )
        prompt = measure_prompt(llm.engine, 8, make_plans("random", [0, 1], llm.config), rounds=1)
        config = llm.config
    assert [(r.name, r.skip_asked, r.skip_got) for r in rows] == [
        ("dense", None, None),
        ("skip 0", 0, 0),
        ("skip 2", 2, 2),
        ("peer", None, None),
    ]
    dense, _, all_skipped, other = rows
    assert dense.speedup == 1.0
    assert all_skipped.speedup == pytest.approx(dense.ms_median / all_skipped.ms_median)
    assert all_skipped.ideal == pytest.approx(ideal_speedup(config, 2, context=4))
    assert all_skipped.of_ideal == pytest.approx(all_skipped.speedup / all_skipped.ideal)
    assert all_skipped.over_peers == {
        "peer": pytest.approx(other.ms_median / all_skipped.ms_median)
    }
    assert dense.work_share == pytest.approx(dense.work / dense.given) and dense.given != 10
    reads = all_skipped.ideal * all_skipped.given / dense.given
    assert all_skipped.ideal_reads == pytest.approx(reads)
    assert all_skipped.of_reads == pytest.approx(all_skipped.speedup / reads)
    size = bytes_per_token(config, 0, weight_bytes=2, context=4, routers=False)
    assert dense.work == pytest.approx(size / dense.ms_median / 1e6)
    assert (other.work, other.ideal, other.over_peers) == (None, None, {})
    assert all(len(r.samples) == 6 and list(r.blocks) == [3, 3] for r in rows)
    assert [(r.name, r.skip_got) for r in prompt] == [("dense", None), ("skip 0", 0), ("skip 1", 1)]
    assert prompt[2].ideal == pytest.approx(
        flops_of_prompt(config, 8, 0.0, routers=False) / flops_of_prompt(config, 8, 0.5)
    )
    ((title, group, columns),) = tables(rows)
    assert title == ", bfloat16, cpu, tg6 @ d4, 1 thread" and group == rows
    texts = markdown(rows, columns).splitlines()
    assert len(texts) == 6
    assert texts[0].startswith("| tg6 @ d4 | asked | got |") and texts[0].endswith("| x peer |")
    parsed = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert float(parsed[2]["ideal"]) == all_skipped.ideal
    assert float(parsed[2]["over peer"]) == all_skipped.over_peers["peer"]
    assert len({len(line) for line in table(rows, DECODE_COLUMNS).splitlines()}) == 1


def test_sequences_decode_side_by_side_by_masks_of_their_own(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        plans = make_plans("random", [1], llm.config)
        case = decode_case(llm.engine, plans[0], batch=8, depth=4, steps=6)
        case.start()
        for _ in range(6):
            case.step()
            case.after()
        rows = measure_decode(llm.engine, plans, batch=8, depth=4, rounds=1, steps=6)
        config = llm.config
    masks = torch.stack(case.decided)
    assert masks.shape == (6, 8, 2) and (masks.sum(-1) == 1).all()
    assert any(len(step.unique(dim=0)) == 2 for step in masks)  # sequences differ
    one = rows[1]
    assert one.skip_got == 1
    # A layer is read if any sequence runs it: with 8 sequences that is nearly the dense model.
    mean = sum(step_bytes(config, m, 2, 4, 8) for m in masks) / 6
    assert 1 / one.ideal == pytest.approx(mean / step_bytes(config, None, 2, 4, 8), rel=0.2)
    assert one.ideal < ideal_speedup(config, 1, context=4)
    assert one.tps_mean == pytest.approx(8 * sum(1 / s for s in one.samples) / 6)


def test_caches_that_do_not_fit_are_said_with_their_size(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexidepth.bench.decode.available_memory_bytes", lambda: 1000)
    with (
        FlexiDepth.from_pretrained(model, num_threads=1) as llm,
        pytest.raises(OutOfMemoryError, match=r"3 sequences of 42 tokens need 0\.0 GB of keys and"),
    ):
        measure_decode(llm.engine, [], batch=3, depth=4, steps=4)


def test_a_peer_that_fails_meanwhile_is_a_row(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)

    def fail() -> None:
        raise RuntimeError("it broke")

    peers = [
        Case("bad", fail, foreign=True, note="x"),
        Case("good", lambda: None, foreign=True, note="f32"),
    ]
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        dense, bad, good = measure_decode(llm.engine, [], peers=peers, depth=4, steps=4, rounds=2)
    assert (bad.said, bad.ms_median, bad.peer) == ("RuntimeError: it broke", None, True)
    assert good.said == "f32" and good.ms_median and list(dense.over_peers) == ["good"]
