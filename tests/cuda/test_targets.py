"""What the engine is meant to reach, beside what was measured."""

from __future__ import annotations

from bench.gpu.engine_peers import PeerRow
from bench.gpu.engine_report import EngineReport, engine_lines
from bench.gpu.engine_timing import DecodeRow, PromptRow
from bench.gpu.targets import targets


def decode(skipped: int | None, ms: float, ideal: float = 1.0, **changes: float) -> DecodeRow:
    values = {"batch": 1, "context": 128, "share": 0.9, "speedup": 10.0 / ms} | changes
    return DecodeRow(
        int(values["batch"]),
        int(values["context"]),
        skipped,
        ms,
        ms,
        1e3 / ms,
        1.0,
        values["share"],
        values["speedup"],
        ideal,
    )


def test_targets_of_a_large_model() -> None:
    report = EngineReport(
        "llama-3-8b",
        False,
        16,
        decode=[
            decode(None, 10.0),
            decode(0, 10.2, 0.99),
            decode(8, 8.5, 1.25),
            decode(16, 7.0, 1.6),
            decode(None, 11.0, batch=4, speedup=1.0),
            decode(0, 11.6, 0.99, batch=4, speedup=0.92),
            decode(8, 12.0, 1.01, batch=4, speedup=0.97),
            decode(16, 12.0, 1.2, batch=4, speedup=1.15),
            decode(2, 12.0, 0.98, batch=4, context=4096, speedup=0.97),
        ],
        prompts=[
            PromptRow(2048, 0.5, 1.0, 2048, 1.0, 1.2, 1.3),
            PromptRow(2048, None, 1, 1, 1, 1, 1),
        ],
        peers=[PeerRow("a", 128, 10.4), PeerRow("b", 128, 12.0), PeerRow("c", 128, None, "no")],
    )
    found = [(t.what, round(t.found, 3), t.met) for t in targets(report)]
    assert found == [
        ("context 128: dense, share of a copy's bandwidth", 0.9, True),
        ("context 128: dense over the best peer", 1.04, False),
        ("context 128: every layer run over dense, time", 1.02, True),
        ("context 128: 8 skipped, x dense", 1.176, False),
        ("context 128: least of ideal, at 16 skipped", 0.893, False),
        ("4 sequences, context 128: least x dense where bytes allow 1, at 8 skipped", 0.97, False),
        ("4 sequences, context 128: least of ideal, at 0 skipped", 0.929, False),
        ("4 sequences, context 4096: least of ideal, at 2 skipped", 0.99, True),
        ("prompt of 2048, half skipped, time over that by arithmetic", 1.083, True),
    ]
    lines = engine_lines(report)
    assert "| context 128: dense over the best peer | at least 1.05 | 1.040 | MISSED |" in lines
    assert "| context 128: every layer run over dense, time | at most 1.03 | 1.020 | met |" in lines
    assert [t["met"] for t in report.to_dict()["targets"]] == [met for _, _, met in found]


def test_targets_of_a_small_model_and_of_others() -> None:
    rows = [decode(None, 0.45), decode(None, 0.7, context=4096)]
    (only,) = targets(EngineReport("smollm2-135m", False, 15, decode=rows))
    assert (only.what, only.found, only.met) == (
        "dense, context 128: microseconds a token",
        450.0,
        True,
    )
    assert targets(EngineReport("smollm2-135m", False, 15)) == []
    assert targets(EngineReport("llama-3.2-1b", False, 8, decode=rows)) == []
    assert not any("target" in line for line in engine_lines(EngineReport("other", False, 8)))
