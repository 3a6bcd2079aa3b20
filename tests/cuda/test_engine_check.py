"""`gpu_check --engine` as far as it goes without a device: the whole run on emulated kernels, figures and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import gpu_check
from bench.gpu import engine_check, engine_run, engine_timing
from bench.gpu.check_report import Report, write_report
from bench.gpu.costs import CostRow
from bench.gpu.engine_peers import PeerRow
from bench.gpu.engine_report import EngineReport, engine_lines
from bench.gpu.isolated import apart
from bench.ideal import bytes_per_token, step_bytes
from bench.models import model_config, random_weights, skip_masks
from flexidepth.errors import OutOfMemoryError
from flexidepth_ext.cuda_cache import CudaKVCache
from flexidepth_ext.cuda_engine import CudaEngine
from tests.emulation.build import build, build_folder, load

from .runtime import FakeRuntime


@pytest.fixture
def found(emulated, monkeypatch):
    monkeypatch.setattr(engine_timing, "WARM_UP", 1)
    checks, reports, saved = [], [], []
    engine_run.run(
        ["tiny"],
        1e9,
        False,
        lambda _: None,
        checks,
        reports,
        lambda: saved.append(None),
        check_tokens=40,
        make_runtime=lambda: FakeRuntime(emulated),
        checked=["tiny"],
        contexts=(8,),
        batches=(1, 2),
        prompt=16,
        steps=2,
    )
    # After each check, and of each way to run the model after each batch, parts behind them, and at its end.
    assert len(saved) == 2 + 2 * (2 + 2 + 2) + (2 + 2)
    return checks, reports


def test_the_whole_run(found, tmp_path):
    checks, reports = found
    assert [check.dtype for check in checks] == ["bfloat16", "float16"]
    for check in checks:
        assert check.ok and 0 < check.prompt_error < 1 and check.same_tokens
        assert not replace(check, same_tokens=False).ok
        assert check.same_bits and not replace(check, same_bits=False).ok
        assert check.overlap and not replace(check, overlap=False).ok
        assert replace(check, overlap=None).ok  # of a device that has no such launches
        assert not replace(check, token_error=3 * check.torch_error).ok
        assert not replace(check, agreement=0.99).ok
    assert [(r.model, r.overlap, r.persistent) for r in reports] == [
        ("tiny", False, False),
        ("tiny", True, False),
        ("tiny", False, True),
    ]
    assert [(c.sequences, c.routing, list(c.seconds)) for c in reports[0].choices] == [
        (sequences, routing, ["kernels", "overlap", "persistent"])
        for sequences in (1, 2)
        for routing in ("dense", "router")
    ]
    assert [len(report.decode) for report in reports] == [8, 8, 8]
    rows = reports[0].decode
    assert [(r.batch, r.skipped) for r in rows] == [
        (batch, n) for batch in (1, 2) for n in (None, 0, 1, 2)
    ]
    for row in rows:
        assert row.tokens_per_second == pytest.approx(row.batch * 1e3 / row.ms)
        assert row.speedup > 0 and (row.ideal == 1 if row.skipped is None else row.ideal > 0.5)
    assert rows[3].ideal > rows[2].ideal > rows[1].ideal
    assert [p.share for p in reports[0].prompts] == [None, 0, 0.5, 1]
    for one in reports[:2]:
        ways = [(row.skipped, row.kb) for row in one.prefetch]
        assert ways == [(n, kb) for n in (0, 1, 2) for kb in (0, 1024, 4096, 16384)]
        assert all(row.ms > 0 for row in one.prefetch)
    report = Report("a device", "9.0", {"commit": "abc"}, "python x", bandwidth=1e9)
    report.checks, report.engines = checks, reports
    report.costs = [
        CostRow(key, "us", 2.0, 1.0, 3.0)
        for key in ("read", "phase", "idle_1000", "phase_overlap", "idle_1000_overlap")
    ]
    write_report(report, tmp_path)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| tiny | bfloat16 |" in text and "## tiny, kernels overlap" in text
    assert "## tiny, one persistent kernel" in text and "same bits" in text
    assert "| same tokens and bits | ok |" in text
    assert "| 2 | 1 | router | 1000.000 | 1000.000 | 1000.000 | kernels |" in text
    assert "| 1 | 8 | dense |" in text and "| 16 | 50% |" in text
    assert "| idle kernel of 1000 blocks | 2.00 | 1.00 to 3.00 | us |" in text
    assert text.count("| 8 | dense | this card's costs | 0.") == 2
    assert "| KiB | 0 skipped | 1 skipped | 2 skipped |" in text and "\n| 16384 | " in text
    written = json.loads((tmp_path / "gpu_check.json").read_text())
    assert written["ok"] and len(written["engines"][0]["decode"]) == len(rows)
    assert [p["overlap"] for p in written["predictions"]] == [False, True]
    assert [r["skipped"] for r in written["predictions"][0]["rows"]] == [None, 0, 1, 2]
    assert written["costs"][0]["what"] == "reading the device's memory"
    assert (tmp_path / "gpu_check.png").stat().st_size > 1000


def emulated_runtime() -> FakeRuntime:
    """What another process can make for itself."""
    return FakeRuntime(load(build(build_folder("emulation"))))


@pytest.mark.usefixtures("emulated")
def test_a_stage_in_a_process_of_its_own(monkeypatch):
    """All that it sends goes from one process to another."""
    monkeypatch.setattr(engine_run, "_variants", lambda *_: [(False, False)])
    checks, reports, ended = [], [], []

    def way(work, arguments, take, seconds):
        ended.append(apart(work, arguments, take, seconds))
        return ended[-1]

    engine_run.run(
        ["tiny"],
        1e9,
        False,
        lambda _: None,
        checks,
        reports,
        lambda: None,
        make_runtime=emulated_runtime,
        checked=[],
        contexts=(8,),
        batches=(1,),
        prompt=16,
        steps=2,
        persistent=False,
        way=way,
    )
    assert ended == [""]
    (report,) = reports
    assert report.decode and report.prefetch and report.prompts and not report.said


def test_what_ends_a_stage_is_told_and_the_next_one_goes_on(emulated):
    """What had come from it stays."""
    row = PeerRow("x", 8, 2.0)

    def way(work, arguments, take, seconds):
        if work is engine_run._time:
            report, *_ = arguments
            take(replace(report, prompts=["a row"]))
        elif work is engine_run._time_peers:
            take(row)
        return "stopped: its process was ended by SIGKILL"

    checks, reports = [], []
    make = lambda: FakeRuntime(emulated)  # noqa: E731
    engine_run.run(
        ["tiny"], 1e9, True, print, checks, reports, lambda: None, make_runtime=make, way=way
    )
    said = "stopped: its process was ended by SIGKILL"
    assert [check.said for check in checks] == [said] * 4
    assert [(report.said, report.prompts) for report in reports] == [(said, ["a row"])] * 3
    assert reports[0].peers == [row] and reports[0].left_out == [f"peers: {said}"]


def test_a_wrong_engine_is_timed_and_told(emulated, monkeypatch):
    check = engine_run.EngineCheck("tiny", "bfloat16", 1.0, 1.0, 0.1, 1.0, True, True, None)
    monkeypatch.setattr(engine_run, "check_engine", lambda *_: check)
    monkeypatch.setattr(engine_run, "_time", lambda *_: None)
    make = lambda: FakeRuntime(emulated)  # noqa: E731
    checks, reports = [], []
    engine_run.run(["tiny"], 1e9, False, print, checks, reports, lambda: None, make_runtime=make)
    assert len(checks) == 4 and len(reports) == 3
    report = Report("a device", "9.0", {}, "python x", checks=checks)
    assert not report.ok and "FAILED" in gpu_check.markdown(report)


@pytest.mark.parametrize("allowed", [True, False])
def test_a_check_makes_persistent_passes_only_where_they_may_run(emulated, monkeypatch, allowed):
    forms: set[bool | None] = set()

    def noted(*arguments, persistent, **options):
        forms.add(persistent)
        return CudaEngine(*arguments, persistent=persistent, **options)

    monkeypatch.setattr(engine_check, "CudaEngine", noted)
    runtime = FakeRuntime(emulated)
    check = engine_check.check_engine(
        "tiny", model_config("tiny"), torch.bfloat16, runtime, 12, allowed
    )
    assert forms == ({None, False, True} if allowed else {False})
    assert check.ok and check.same_bits is (True if allowed else None)


def test_what_stops_a_model_is_told(emulated, monkeypatch):
    def refuse(*_, **__):
        raise OutOfMemoryError("engine: no memory")

    monkeypatch.setattr(engine_run, "CudaEngine", refuse)
    monkeypatch.setattr(engine_run, "time_peers", lambda *_, **__: [])
    make, reports = lambda: FakeRuntime(emulated), []
    engine_run.run(
        ["tiny"], 1e9, True, print, [], reports, lambda: None, make_runtime=make, checked=[]
    )
    assert reports[0].said == "stopped: OutOfMemoryError: engine: no memory"
    assert reports[0].peers == []
    report = Report("a device", "9.0", {}, "python x", engines=reports)
    assert "engine: no memory" in gpu_check.markdown(report) and not report.ok


def test_a_batch_that_does_not_fit_is_left_out_and_the_next_one_timed(emulated, monkeypatch):
    extend = CudaKVCache.extend_with_zeros

    def refuse(self, tokens):
        if tokens == 9:
            raise OutOfMemoryError("cache: 9 tokens take too much")
        extend(self, tokens)

    monkeypatch.setattr(CudaKVCache, "extend_with_zeros", refuse)
    monkeypatch.setattr(engine_timing, "WARM_UP", 1)
    report = EngineReport("tiny", False, 2)
    make = lambda: FakeRuntime(emulated)  # noqa: E731
    engine_run._time(report, make, 1e9, (8, 9), (1,), 16, 2, lambda _: None)
    assert report.left_out == ["1 sequences of 9 tokens: cache: 9 tokens take too much"]
    assert {row.context for row in report.decode} == {8} and report.prompts and not report.said
    assert "Left out: 1 sequences of 9 tokens" in "\n".join(engine_lines(report))


def test_weights_are_those_of_the_model():
    config = model_config("tiny")
    weights = dict(random_weights(config, torch.bfloat16, "cpu"))
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert weights["model.layers.2.router.enc.weight"].std() > 0
    big = model_config("llama-3-8b")
    assert (big.num_routed_layers, big.adapter_dim) == (16, 896)


def test_masks_skip_exactly_so_many():
    masks = skip_masks(model_config("smollm2-135m"), 3, 4, 5)
    assert len(masks) == 5
    for mask in masks:
        assert mask.shape == (3, 15) and mask.sum(1).tolist() == [11, 11, 11]
    assert not torch.equal(masks[0], masks[1])


def test_bytes_are_those_of_the_union():

    config = model_config("smollm2-135m")
    assert step_bytes(config, None, 2, 7, 1) == bytes_per_token(config, 0, context=7, routers=False)
    one = torch.ones(1, 15, dtype=torch.uint8)
    assert step_bytes(config, one, 2, 7, 1) == bytes_per_token(config, 0, context=7)
    one[0, :4] = 0
    assert step_bytes(config, one, 2, 7, 1) == bytes_per_token(config, 4, context=7)
    two = torch.cat([one, 1 - one])
    both = step_bytes(config, two, 2, 0, 2)
    everything = step_bytes(config, torch.ones(2, 15, dtype=torch.uint8), 2, 0, 2)
    adapters = 15 * 2 * 3 * 576 * config.adapter_dim
    assert both == everything + adapters
