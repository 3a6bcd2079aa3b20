"""The check of a machine with a device, as far as one without it reaches: cases, targets, report, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import gpu_check
from bench.gpu.cases import LLAMA_3_8B, OpCase, Shape, Target, op_cases, router_case
from bench.gpu.check_report import Report, markdown
from bench.gpu.check_steps import Step, run_step
from bench.gpu.layer_cases import layer_cases
from bench.gpu.timing import copies_of, time_case

TINY = Shape("tiny", 32, 48, 4, 2, 8, 70, 6, 16, 300)
BANDWIDTH = 1e12


def case(nbytes: float = 100e6, target: Target | None = None, runs: list | None = None) -> OpCase:
    made = [] if runs is None else runs

    def make():
        made.append(None)
        return lambda: None

    return OpCase("linear", "[2, 3]", 1, nbytes, make, target)


def test_every_case_runs(ops):
    cases = [
        *op_cases(ops, TINY, torch.bfloat16, ops.device_type, (1, 9)),
        *layer_cases(ops, TINY, torch.bfloat16, ops.device_type, (1, 3, 9)),
        router_case(ops, TINY, ops.device_type),
    ]
    for one in cases:
        assert one.nbytes > 0
        one.make()()
    found = {(one.op, one.rows) for one in cases}
    for op in ("linear", "feed_forward", "adapter", "lm_head", "attention"):
        assert {(op, 1), (op, 9)} <= found
    for op in ("router_code", "routed_entry", "routed_exit", "routed layer"):
        assert {(op, 1), (op, 3)} <= found and (op, 9) not in found
    assert {("compact", 4096), ("router_gate", 1), ("attention", 150)} <= found


def test_the_targets_of_the_large_model():
    cases = list(op_cases(None, LLAMA_3_8B, torch.bfloat16, "meta", (1, 4)))  # type: ignore[arg-type]
    cases += layer_cases(None, LLAMA_3_8B, torch.bfloat16, "meta", (1, 4))  # type: ignore[arg-type]
    aims = {(c.op, c.what): c.target for c in cases if c.target is not None}
    assert aims["linear", "[14336, 4096]"] == aims["linear", "[4096, 14336]"] == Target(0.85)
    assert aims["lm_head", "vocabulary 128256"] == Target(0.85)
    assert ("linear", "[1024, 4096]") not in aims  # 8 MB
    assert aims["router_code", "d_r 256"] == Target(factor=1.1, extra=3.0)
    assert aims["routed_entry", "rows skip"] == Target(factor=1.1, extra=3.0)
    assert aims["attention", "context 8192"] == Target(0.75)
    assert aims["adapter", "width 896"] == Target(factor=1.15, extra=5.0)
    assert aims["compact", "gates"] == Target(extra=5.0)
    assert all(c.rows in (1, 4096) for c in cases if c.target is not None)
    (head,) = (c for c in cases if c.op == "lm_head" and c.rows == 1)
    assert head.nbytes == 128256 * 4096 * 2
    # The router in float32, keys and values, the adapter: what docs call a skipped layer.
    (skipped,) = (c for c in cases if c.op == "routed layer" and c.rows == 1)
    assert skipped.nbytes == 4096 * (256 * 4 + 2 * (2 * 1024 + 3 * 896))


@pytest.mark.parametrize(
    ("target", "most", "words"),
    [
        (Target(0.8), 125.0, ">= 80% of copy bandwidth"),
        (Target(factor=1.1, extra=3), 113.0, "<= 1.1 x bytes / bandwidth + 3 us"),
        (Target(extra=5), 5.0, "<= 5 us"),
    ],
)
def test_targets(target, most, words):
    assert target.most_microseconds(100e6, BANDWIDTH) == pytest.approx(most)
    assert str(target) == words


@pytest.mark.parametrize(("seconds", "met"), [(110e-6, True), (114e-6, False)])
def test_a_row(seconds, met):
    runs: list = []
    samples = [seconds, seconds * 0.9, seconds * 1.2]
    row = time_case(
        case(target=Target(factor=1.1, extra=3), runs=runs), BANDWIDTH, lambda r: samples
    )
    assert len(runs) == 3 == copies_of(case())  # 256 MB and more in all
    assert row.microseconds == pytest.approx(seconds * 1e6) and row.met is met
    assert row.share == pytest.approx(100e6 / seconds / BANDWIDTH)
    assert time_case(case(), BANDWIDTH, lambda r: samples).met is None


@pytest.mark.parametrize(("nbytes", "copies"), [(1e9, 1), (130e6, 2), (1e3, 2048)])
def test_copies_exceed_the_caches(nbytes, copies):
    assert copies_of(case(nbytes)) == copies


def test_the_report_names_device_steps_and_missed_targets():
    report = Report("H100", "9.0", {"commit": "abc", "versions": {"torch": "2"}}, "python x", [])
    report.steps = [Step("build", True, 1.2, "fine"), Step("memcheck", None, 0, "not found")]
    report.bandwidth = 3e12
    report.rows = {"M": [time_case(case(target=Target(0.9)), 3e12, lambda r: [50e-6])]}
    text = markdown(report)
    assert "# CUDA kernels on H100" in text and "3000 GB/s" in text and "commit abc" in text
    assert "| build | ok | 1 | fine |" in text and "| memcheck | left out | 0 | not found |" in text
    assert (
        "| linear | [2, 3] | 1 | 50.0 | 0.0 | 100.0 | 2000 | 67% |  | >= 90% of copy bandwidth | no |"
        in text
    )
    assert report.ok and json.loads(json.dumps(report.to_dict()))["rows"]["M"][0]["met"] is False
    report.steps.append(Step("tests", False, 1, "1 failed"))
    assert not report.ok and "| tests | FAILED | 1 | 1 failed |" in markdown(report)


@pytest.mark.parametrize(
    ("code", "ok", "said"),
    [
        (
            "print('x'); print('== 3 passed, 1 skipped in 2.1s ==')",
            True,
            "3 passed, 1 skipped in 2.1s",
        ),
        (
            "print('2 failed, 1 passed in 1s'); raise SystemExit(1)",
            False,
            "2 failed, 1 passed in 1s",
        ),
        ("print('only this')", True, "only this"),
        ("import time; time.sleep(60)", False, "took more than 1 s"),
    ],
)
def test_steps(code, ok, said):
    step = run_step("x", [sys.executable, "-c", code], 1 if "sleep" in code else 60)
    assert (step.ok, step.said) == (ok, said)


def test_a_program_that_is_not_there():
    step = run_step("x", ["/no/such/program"], 1)
    assert step.ok is False and "/no/such/program: No such file" in step.said


def run(*arguments: object):
    app = typer.Typer()
    app.command()(gpu_check.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a device")
def test_without_a_device(tmp_path: Path):
    result = run("--output-dir", tmp_path / "out")
    assert result.exit_code == 1
    assert "finds no CUDA device" in result.output and "flexidepth doctor" in result.output
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path: Path):
    assert "wanted some of llama-3-8b, smollm2-135m" in run("--shapes", "x").output
    (tmp_path / "file").write_text("")
    result = run("--output-dir", tmp_path / "file")
    assert result.exit_code == 1 and "is a file" in result.output


def test_a_checkout_of_gpt_fast_is_an_option_or_a_variable():
    result = run("--help")
    assert "--gpt-fast" in result.output and "FLEXIDEPTH_GPT_FAST" in result.output
