"""Proves and times CUDA on this machine: `python -m bench.gpu_check`, from the repository, in ten minutes.

Builds for the devices that are there, runs the tests of the kernels against the plain reference on the device,
compute-sanitizer where it is installed, and times each op against the bandwidth of a copy. With --engine it checks
and times the engine instead, whole models against layers skipped. Writes gpu_check.json, gpu_check.md and, of the
engine, gpu_check.png.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import FlexiDepthError
from flexidepth.plots import save_figure

from .gpu import engine_run
from .gpu.cases import LLAMA_3_8B, SMOLLM2, Shape, op_cases, router_case
from .gpu.costs import CostRow, cost_lines, measure_costs
from .gpu.engine_check import EngineCheck
from .gpu.engine_report import (
    EngineReport,
    check_lines,
    engine_figure,
    engine_lines,
    prediction_lines,
)
from .gpu.layer_cases import layer_cases
from .gpu.predictions import Beside, assumed_devices, beside
from .gpu.timing import OpRow, copy_bandwidth, measure_in_graphs, time_case
from .machine import describe_machine
from .models import model_config
from .results_folder import check_folder, replace_results

FILES = ("gpu_check.json", "gpu_check.md", "gpu_check.png")
_ROOT = Path(__file__).resolve().parents[1]
_SHAPES: dict[str, Shape] = {"llama-3-8b": LLAMA_3_8B, "smollm2-135m": SMOLLM2}
_ROWS = (1, 4, 8, 16, 64)
# Tools of compute-sanitizer, and as many tests as they can do: they are slow.
_SANITIZERS = {
    "memcheck": "linear_accumulates or seconds_page or plain_layer and 20",
    "racecheck": "compaction and 64",
}
_SUMMARY = re.compile(r"^=*\s*(\d+ (?:passed|failed|error).*?)\s*=*$", re.MULTILINE)


@dataclass
class Step:
    """A part of the check. ok: None = left out, and `said` says why."""

    name: str
    ok: bool | None
    seconds: float
    said: str


@dataclass
class Report:
    """Everything that is written."""

    device: str
    capability: str
    machine: dict[str, Any]
    command: str
    steps: list[Step] = field(default_factory=list)
    bandwidth: float = 0.0
    rows: dict[str, list[OpRow]] = field(default_factory=dict)
    costs: list[CostRow] = field(default_factory=list)
    checks: list[EngineCheck] = field(default_factory=list)
    engines: list[EngineReport] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; a target that is missed is a figure, not a failure."""
        steps = all(step.ok is not False for step in self.steps)
        engines = not any(engine.said for engine in self.engines)
        return steps and engines and all(check.ok for check in self.checks)

    def predictions(self, engine: EngineReport) -> list[Beside]:
        """What arithmetic says of an engine's steps, by the data sheet and by this card's own costs.

        Nothing of persistent passes: predicted are kernels and what lies between them."""
        if engine.persistent:
            return []
        devices = assumed_devices(self.device, self.costs, engine.overlap)
        return beside(model_config(engine.model), engine.decode, devices)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **asdict(self),
            "ok": self.ok,
            "costs": [row.to_dict() for row in self.costs],
            "predictions": [
                {
                    "model": engine.model,
                    "overlap": engine.overlap,
                    "rows": [row.to_dict() for row in self.predictions(engine)],
                }
                for engine in self.engines
                if not engine.persistent
            ],
            "rows": {name: [row.to_dict() for row in rows] for name, rows in self.rows.items()},
            "checks": [check.to_dict() for check in self.checks],
            "engines": [engine.to_dict() for engine in self.engines],
        }


def markdown(report: Report) -> str:
    """The report as tables."""
    lines = [
        f"# CUDA kernels on {report.device}",
        "",
        f"Compute capability {report.capability}; a copy moves {report.bandwidth / 1e9:.0f} GB/s. "
        f"Command: `{report.command}`; commit {report.machine.get('commit', '')}; "
        f"{json.dumps(report.machine.get('versions', {}))}.",
        "",
        "| step | | seconds | |",
        "|---|---|--:|---|",
    ]
    words = {True: "ok", False: "FAILED", None: "left out"}
    for step in report.steps:
        lines.append(f"| {step.name} | {words[step.ok]} | {step.seconds:.0f} | {step.said} |")
    for name, rows in report.rows.items():
        lines += [
            "",
            f"## {name}, bfloat16",
            "",
            "| op | | rows | us | ± | MB | GB/s | of copy | TFLOP/s | target | met |",
            "|---|---|--:|--:|--:|--:|--:|--:|--:|---|---|",
        ]
        for r in rows:
            flops = "" if r.teraflops is None else f"{r.teraflops:.1f}"
            met = {True: "yes", False: "no", None: ""}[r.met]
            lines.append(
                f"| {r.op} | {r.what} | {r.rows} | {r.microseconds:.1f} | {r.deviation:.1f} | {r.megabytes:.1f} "
                f"| {r.gigabytes_per_second:.0f} | {r.share:.0%} | {flops} | {r.target} | {met} |"
            )
    if report.checks:
        lines += ["", *check_lines(report.checks)]
    if report.costs:
        lines += ["", *cost_lines(report.costs)]
    for engine in report.engines:
        lines += engine_lines(engine)
        lines += prediction_lines(report.predictions(engine))
    if not report.rows:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "Every time is the median of replays of a CUDA graph that runs the op in turn on copies of its weights, which "
        "together exceed every cache. The bytes are those of weights, or of keys and values.",
    ]
    return "\n".join(lines) + "\n"


def run_step(name: str, command: Sequence[str], seconds: float, **env: str) -> Step:
    """Run a command; its last words, or the summary of its tests, are what it said."""
    begin = time.monotonic()
    try:
        result = subprocess.run(
            command,
            cwd=_ROOT,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Step(name, False, time.monotonic() - begin, f"took more than {seconds:.0f} s")
    except OSError as error:
        return Step(name, False, time.monotonic() - begin, f"{command[0]}: {error.strerror}")
    output = result.stdout + result.stderr
    found = _SUMMARY.findall(output)
    last = output.strip().splitlines()[-1:] or [""]
    said = found[-1] if found else last[0]
    if result.returncode:
        say(output[-3000:])
    return Step(name, result.returncode == 0, time.monotonic() - begin, said)


def build_step() -> Step:
    """Build for the devices of this machine."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-e",
        ".",
    ]
    return run_step("build", command, 300, FLEXIDEPTH_CUDA="ON")


def test_steps() -> list[Step]:
    """The kernels' tests on the device, by themselves and under compute-sanitizer."""
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/cuda"]
    on_device = {"FLEXIDEPTH_TEST_DEVICE": "cuda", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
    steps = [run_step("tests on the device", tests, 240, **on_device)]
    sanitizer = shutil.which(
        "compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    )
    for tool, chosen in _SANITIZERS.items():
        if sanitizer is None:
            steps.append(Step(tool, None, 0.0, "compute-sanitizer was not found"))
            continue
        checked = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests, "-k", chosen]
        steps.append(run_step(tool, checked, 120, **on_device))
    return steps


def engine_test_steps() -> list[Step]:
    """The engine's tests on the device."""
    files = [
        f"tests/cuda/test_{name}.py"
        for name in ("engine", "persistent", "choice", "decode", "generate")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files]
    return [run_step("tests on the device", command, 240, FLEXIDEPTH_TEST_DEVICE="cuda")]


def time_ops(shape: Shape, bandwidth: float, rows: Sequence[int]) -> list[OpRow]:
    """Every op at the shapes of a model; what does not fit the device's memory is left out and said."""
    from flexidepth_ext.cuda_ops import cuda_ops

    ops, found = cuda_ops(), []
    cases = [
        *op_cases(ops, shape, torch.bfloat16, "cuda", tuple(rows)),
        *layer_cases(ops, shape, torch.bfloat16, "cuda", tuple(rows)),
        router_case(ops, shape, "cuda"),
    ]
    for case in cases:
        try:
            found.append(time_case(case, bandwidth, measure_in_graphs))
        except torch.OutOfMemoryError:
            say(
                f"{case.op} {case.what}, {case.rows} rows: left out, the device's memory is too small"
            )
        torch.cuda.empty_cache()
    return found


@command_errors
def main(
    output_dir: Annotated[Path, typer.Option(help="Where results go.")] = Path("gpu_check"),
    build: Annotated[bool, typer.Option(help="Build first.")] = True,
    tests: Annotated[bool, typer.Option(help="Run the tests on the device.")] = True,
    engine: Annotated[
        bool, typer.Option("--engine", help="Check and time the engine, not the ops.")
    ] = False,
    shapes: Annotated[str, typer.Option(help="Models to time.")] = ",".join(_SHAPES),
    rows: Annotated[str, typer.Option(help="Numbers of rows of the ops.")] = ",".join(
        map(str, _ROWS)
    ),
    peers: Annotated[bool, typer.Option(help="Time others beside the engine.")] = True,
    gpt_fast: Annotated[
        Path | None,
        typer.Option(
            envvar="FLEXIDEPTH_GPT_FAST",
            help="A checkout of gpt-fast, to be timed among the peers.",
        ),
    ] = None,
) -> None:
    """Build, test and time the CUDA kernels, or the engine, on this machine's device."""
    names = [name for name in shapes.split(",") if name]
    if wrong := [name for name in names if name not in _SHAPES]:
        raise typer.BadParameter(f"--shapes {wrong[0]}: wanted some of {', '.join(_SHAPES)}")
    check_folder(output_dir)
    _check_device(build)
    report = Report(
        torch.cuda.get_device_name(),
        ".".join(map(str, torch.cuda.get_device_capability())),
        describe_machine(),
        f"python -m bench.gpu_check {' '.join(sys.argv[1:])}".strip(),
    )
    if build:
        report.steps.append(build_step())
        say(f"build: {report.steps[-1].said}")
    if tests and report.ok:
        report.steps += engine_test_steps() if engine else test_steps()
    if report.ok:
        report.bandwidth = copy_bandwidth()
        counts = [int(number) for number in rows.split(",")]
        if engine:
            say("costs of mechanisms")
            report.costs = measure_costs(torch.cuda.get_device_capability())
            engine_run.run(
                names,
                report.bandwidth,
                peers,
                say,
                report.checks,
                report.engines,
                lambda: write_report(report, output_dir),
                gpt_fast=gpt_fast,
            )
        for name in [] if engine else names:
            report.rows[_SHAPES[name].name] = time_ops(_SHAPES[name], report.bandwidth, counts)
    for path in write_report(report, output_dir):
        say(f"wrote {path}")
    print(markdown(report))
    if not report.ok:
        raise typer.Exit(1)


def _check_device(build: bool) -> None:
    if torch.cuda.is_available():
        return
    from flexidepth_ext.cuda_device import cuda_module

    if not build:
        cuda_module()  # says what is missing, if it knows
    raise FlexiDepthError(
        f"gpu_check: torch {torch.__version__} finds no CUDA device; wanted: a machine with one, and a "
        "torch built for CUDA (`flexidepth doctor` tells what is here)"
    )


def write_report(report: Report, output_dir: Path) -> list[Path]:
    """Write the files of a report, in place of those of an earlier one."""
    text = markdown(report)

    def write(folder: Path) -> None:
        (folder / FILES[0]).write_text(
            json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8"
        )
        (folder / FILES[1]).write_text(text, encoding="utf-8")
        if any(engine.decode for engine in report.engines):
            try:
                save_figure(engine_figure(report.engines, report.device), folder / FILES[2])
            except FlexiDepthError as error:  # no matplotlib
                say(f"no plot: {error}")

    return list(replace_results(output_dir, write, FILES))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
