"""Proves and times CUDA on this machine: `python -m bench.gpu_check`, from the repository, in ten minutes.

Builds for the devices that are there, runs the tests of the kernels against the plain reference on the device,
times each op against the bandwidth of a copy, and runs some tests under compute-sanitizer where it is installed. With
--engine it checks and times the engine instead, whole models against layers skipped. What fails is told at the end and
keeps nothing else from being measured, but for the build. Writes gpu_check.json, gpu_check.md and, of the engine,
gpu_check.png, again and again as results come.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import FlexiDepthError
from flexidepth.plain_json import json_text
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
    told,
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
_SANITIZER_SECONDS = 120
_PERSISTENT = "FLEXIDEPTH_CUDA_PERSISTENT"
_ENGINE_FILES = [f"tests/cuda/test_{name}.py" for name in ("engine", "decode", "generate")]
# Of kernels whose blocks wait for each other, which could be for ever.
_PERSISTENT_FILES = ("tests/cuda/test_persistent.py", "tests/cuda/test_choice.py")
_NO_PERSISTENT = "persistent passes are left out of checks and timings"
_PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=20"]
_PYTEST += ["-o", "faulthandler_timeout=30"]  # a test that hangs is named
_ON_DEVICE = {"FLEXIDEPTH_TEST_DEVICE": "cuda", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
_UNSUPPORTED = "device not supported"  # by compute-sanitizer
_END = 10.0  # seconds that a command takes to end
_KEPT = 20_000  # characters of a step's output, from its end
_MOST_SAID = 1000  # characters of a table's cell
_SUMMARY = re.compile(r"^=*\s*(\d+ (?:passed|failed|error).*?)\s*=*$", re.MULTILINE)


@dataclass
class Step:
    """A part of the check. ok: None = left out, and `said` says why. output: the end of what a command printed."""

    name: str
    ok: bool | None
    seconds: float
    said: str
    output: str = ""


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


def run_step(
    name: str,
    command: Sequence[str],
    seconds: float,
    env: Mapping[str, str] | None = None,
    *,
    late: bool | None = False,
) -> Step:
    """Run a command; its last words, or the summary of its tests, are what it said.

    env: added to the environment. late: what the step is where it takes more than `seconds`: failed, or left out.
    """
    begin = time.monotonic()
    try:
        status, output = _run(command, seconds, env or {})
    except OSError as error:
        return Step(name, False, time.monotonic() - begin, f"{command[0]}: {error.strerror}")
    found = _SUMMARY.findall(output)
    said = found[-1] if found else "".join(output.strip().splitlines()[-1:])
    if status is None:
        last = f"; its last words: {said}" if said else ""
        said = f"took more than {seconds:.0f} s{last}"
    if status != 0:
        say(output[-3000:])
    ok = late if status is None else status == 0
    return Step(name, ok, time.monotonic() - begin, _cell(said), output[-_KEPT:])


def _run(command: Sequence[str], seconds: float, env: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit status and output. Status None: it ran out of its time, and was ended with all that it had started."""
    status = None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds)
        finally:  # Ctrl-C too
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # a driver may keep it
                    process.wait(_END)
        output.seek(0)
        return status, output.read().decode("utf-8", errors="replace")


def _cell(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.split()).replace("|", "/")


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
    return run_step("build", command, 300, {"FLEXIDEPTH_CUDA": "ON"})


def test_steps() -> Iterator[Step]:
    """The ops' tests on the device. Left to --engine are those of persistent passes; the compiler's code, which
    test_objects reads, is no result of a device."""
    left_out = [f"--ignore={path}" for path in ("tests/cuda/test_objects.py", *_PERSISTENT_FILES)]
    command = [*_PYTEST, *left_out, "tests/cuda"]
    yield run_step("tests on the device", command, 240, {**_ON_DEVICE, _PERSISTENT: "0"})


def sanitizer_steps() -> Iterator[Step]:
    """Some of the ops' tests under compute-sanitizer."""
    sanitizer = shutil.which(
        "compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    )
    for tool, tests in _SANITIZERS.items():
        if sanitizer is None:
            yield Step(tool, None, 0.0, "compute-sanitizer was not found")
        else:
            yield _sanitizer_step(sanitizer, tool, tests)


def _sanitizer_step(sanitizer: str, tool: str, tests: str) -> Step:
    """Left out where the tool does not know the device, or is too slow on it."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-q", "tests/cuda", "-k", tests]
    step = run_step(tool, command, _SANITIZER_SECONDS, _ON_DEVICE, late=None)
    refused = [line for line in step.output.splitlines() if _UNSUPPORTED in line.lower()]
    return replace(step, ok=None, said=_cell(refused[0])) if refused else step


def engine_test_steps() -> Iterator[Step]:
    """The engine's tests on the device; those of persistent passes by themselves, since they could hang."""
    many = {**_ON_DEVICE, _PERSISTENT: "0"}
    yield run_step("tests on the device", [*_PYTEST, *_ENGINE_FILES], 240, many)
    name = "tests of persistent passes"
    if not _persistent_allowed():
        yield Step(name, None, 0.0, f"{_PERSISTENT} is 0; {_NO_PERSISTENT}")
        return
    step = run_step(name, [*_PYTEST, *_PERSISTENT_FILES], 90, _ON_DEVICE)
    if step.ok is False:
        os.environ[_PERSISTENT] = "0"
        step.said = f"{step.said}; {_NO_PERSISTENT}"
    yield step


def _persistent_allowed() -> bool:
    return os.environ.get(_PERSISTENT) != "0"


def time_ops(
    shape: Shape,
    bandwidth: float,
    rows: Sequence[int],
    found: list[OpRow],
    save: Callable[[], None],
) -> tuple[bool, str]:
    """Every op at the shapes of a model; `found` is filled, and `save` called, as results come. What stops one op stops
    no other.

    Returns:
        Whether nothing was stopped; and how many were timed, what does not fit the device's memory, what was stopped.
    """
    from flexidepth_ext.cuda_ops import cuda_ops

    ops, large, stopped = cuda_ops(), list[str](), list[str]()
    cases = [
        *op_cases(ops, shape, torch.bfloat16, "cuda", tuple(rows)),
        *layer_cases(ops, shape, torch.bfloat16, "cuda", tuple(rows)),
        router_case(ops, shape, "cuda"),
    ]
    for case in cases:
        what = f"{case.op} {case.what}, {case.rows} rows"
        try:
            found.append(time_case(case, bandwidth, measure_in_graphs))
        except torch.OutOfMemoryError:
            large.append(what)
        except Exception as error:
            stopped.append(f"{what}, {told(error)}")
        with suppress(Exception):
            torch.cuda.empty_cache()
        save()
    said = [f"{len(found)} timed"]
    said += [f"too large for the device's memory: {what}" for what in large]
    return not stopped, "; ".join(said + stopped)


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
    counts = _counts(rows)
    check_folder(output_dir)
    _check_device(build)
    report = Report(
        torch.cuda.get_device_name(),
        ".".join(map(str, torch.cuda.get_device_capability())),
        describe_machine(),
        f"python -m bench.gpu_check {' '.join(sys.argv[1:])}".strip(),
    )
    save = partial(_save, report, output_dir)
    try:
        if _built(report, build, save):
            for step in _test_steps(engine) if tests else ():
                report.steps.append(step)
                save()
            if engine:
                _measure_engine(report, names, peers, gpt_fast, save)
            else:
                _measure_ops(report, names, counts, tests, save)
    except BaseException as error:  # Ctrl-C too
        report.steps.append(Step("the rest", False, 0.0, told(error)))
        raise
    finally:
        try:
            for path in write_report(report, output_dir):
                say(f"wrote {path}")
        finally:
            print(markdown(report))
    if not report.ok:
        raise typer.Exit(1)


def _counts(rows: str) -> list[int]:
    try:
        return [int(number) for number in rows.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--rows {rows}: wanted numbers, as 1,4,64") from None


def _built(report: Report, build: bool, save: Callable[[], None]) -> bool:
    """Whether there is something to test: the build did not fail, or was not asked for."""
    if build:
        report.steps.append(build_step())
        say(f"build: {report.steps[-1].said}")
        save()
    return report.ok


def _test_steps(engine: bool) -> Iterator[Step]:
    return engine_test_steps() if engine else test_steps()


def _attempt(
    report: Report,
    save: Callable[[], None],
    name: str,
    measure: Callable[[], tuple[bool, str]],
) -> None:
    """A step that measures, and says whether it is good and what it found; an exception fails it and nothing else."""
    say(name)
    begin = time.monotonic()
    try:
        ok, said = measure()
    except Exception as error:
        ok, said = False, told(error)
    seconds = time.monotonic() - begin
    report.steps.append(Step(name, ok, seconds, _cell(said)[:_MOST_SAID], said[:_KEPT]))
    save()


def _measure_bandwidth(report: Report, save: Callable[[], None]) -> float:
    """Bytes a second of a copy. Where it cannot be measured all is shown as no share of infinity."""

    def measure() -> tuple[bool, str]:
        report.bandwidth = copy_bandwidth()
        return True, f"{report.bandwidth / 1e9:.0f} GB/s"

    _attempt(report, save, "bandwidth of a copy", measure)
    return report.bandwidth or math.inf


def _measure_ops(
    report: Report,
    names: Sequence[str],
    counts: Sequence[int],
    tests: bool,
    save: Callable[[], None],
) -> None:
    """The ops of each model, then, of the tests, the slow ones."""
    bandwidth = _measure_bandwidth(report, save)
    for name in names:
        shape = _SHAPES[name]
        found = report.rows.setdefault(shape.name, [])
        measure = partial(time_ops, shape, bandwidth, counts, found, save)
        _attempt(report, save, f"ops, {name}", measure)
    for step in sanitizer_steps() if tests else ():
        report.steps.append(step)
        save()


def _measure_engine(
    report: Report,
    names: Sequence[str],
    peers: bool,
    gpt_fast: Path | None,
    save: Callable[[], None],
) -> None:
    """What the card takes for mechanisms, then whole models."""
    bandwidth = _measure_bandwidth(report, save)

    def costs() -> tuple[bool, str]:
        report.costs = measure_costs(torch.cuda.get_device_capability())
        good = [row for row in report.costs if row.median is not None]
        return True, f"{len(good)} of {len(report.costs)} measured"

    def models() -> tuple[bool, str]:
        engine_run.run(
            names,
            bandwidth,
            peers,
            say,
            report.checks,
            report.engines,
            save,
            persistent=_persistent_allowed(),
            gpt_fast=gpt_fast,
        )
        return True, f"{len(report.checks)} checks; {len(report.engines)} ways to run models"

    _attempt(report, save, "costs of mechanisms", costs)
    _attempt(report, save, "engine", models)


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


def _save(report: Report, output_dir: Path) -> None:
    """Write what there is so far; what keeps it from being written may have passed when the report is whole."""
    try:
        write_report(report, output_dir)
    except Exception as error:
        say(f"not written: {error}")


def write_report(report: Report, output_dir: Path) -> list[Path]:
    """Write the files of a report, in place of those of an earlier one."""
    text = markdown(report)

    def write(folder: Path) -> None:
        (folder / FILES[0]).write_text(
            json_text(report.to_dict(), indent=1) + "\n", encoding="utf-8"
        )
        (folder / FILES[1]).write_text(text, encoding="utf-8")
        if any(engine.decode for engine in report.engines):
            try:
                save_figure(engine_figure(report.engines, report.device), folder / FILES[2])
            except Exception as error:  # no matplotlib, say
                say(f"no plot: {error}")

    return list(replace_results(output_dir, write, FILES))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end of its time is a Ctrl-C
    app()
