"""Proves and times CUDA on this machine: `python -m bench.gpu_check`, from the repository, in ten minutes.

Builds for the devices that are there, runs the tests of the kernels against the plain reference on the device,
times each op against the bandwidth of a copy, and runs some tests under compute-sanitizer where it is installed. With
--engine it checks and times the engine instead, whole models against layers skipped. What fails is told at the end and
keeps nothing else from being measured, but for the build; what no time is left for is named. Writes gpu_check.json,
gpu_check.md and, of the engine, gpu_check.png, again and again as results come, and what tests printed into logs/.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import FlexiDepthError

from .gpu import engine_run, ops_run
from .gpu.check_report import Report, markdown, write_report
from .gpu.check_steps import (
    MOST_KEPT,
    Bounds,
    Step,
    build_step,
    cell,
    engine_test_steps,
    persistent_allowed,
    sanitizer_steps,
    test_steps,
)
from .gpu.costs import measure_costs
from .gpu.deadline import Deadline
from .gpu.isolated import apart
from .gpu.timing import copy_bandwidth
from .gpu.told import told
from .machine import describe_machine
from .results_folder import check_folder

_ROWS = (1, 4, 8, 16, 64)
_MOST_SAID = 1000  # characters of a table's cell
_COSTS_SECONDS = 60.0  # for each of compiling and running what measures them


@command_errors
def main(
    output_dir: Annotated[Path, typer.Option(help="Where results go.")] = Path("gpu_check"),
    build: Annotated[bool, typer.Option(help="Build first.")] = True,
    tests: Annotated[bool, typer.Option(help="Run the tests on the device.")] = True,
    engine: Annotated[
        bool, typer.Option("--engine", help="Check and time the engine, not the ops.")
    ] = False,
    shapes: Annotated[str, typer.Option(help="Models to time.")] = ",".join(ops_run.SHAPES),
    rows: Annotated[str, typer.Option(help="Numbers of rows of the ops.")] = ",".join(
        map(str, _ROWS)
    ),
    sanitizers: Annotated[bool, typer.Option(help="Run tests under compute-sanitizer.")] = True,
    deadline: Annotated[
        float, typer.Option(help="Seconds for everything: what none are left for is left out.")
    ] = 570,
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
    if wrong := [name for name in names if name not in ops_run.SHAPES]:
        raise typer.BadParameter(f"--shapes {wrong[0]}: wanted some of {', '.join(ops_run.SHAPES)}")
    counts = _counts(rows)
    bounds = Bounds(Deadline(deadline), output_dir / "logs")
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
        if _built(report, build, bounds, save):
            for step in _test_steps(engine, bounds) if tests else ():
                report.steps.append(step)
                save()
            if engine:
                _measure_engine(report, names, peers, gpt_fast, bounds.deadline, save)
            else:
                _measure_ops(report, names, counts, bounds.deadline, save)
                for step in sanitizer_steps(bounds) if tests and sanitizers else ():
                    report.steps.append(step)  # the slow ones
                    save()
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


def _built(report: Report, build: bool, bounds: Bounds, save: Callable[[], None]) -> bool:
    """Whether there is something to test: the build did not fail, or was not asked for."""
    if build:
        report.steps.append(build_step(bounds))
        say(f"build: {report.steps[-1].said}")
        save()
    return report.ok


def _test_steps(engine: bool, bounds: Bounds) -> Iterator[Step]:
    return engine_test_steps(bounds) if engine else test_steps(bounds)


def _attempt(
    report: Report,
    save: Callable[[], None],
    name: str,
    measure: Callable[[], tuple[bool | None, str]],
) -> None:
    """A step that measures, and says whether it is good (None: left out) and what it found; an exception fails it and
    nothing else."""
    say(name)
    begin = time.monotonic()
    try:
        ok, said = measure()
    except Exception as error:
        ok, said = False, told(error)
    seconds = time.monotonic() - begin
    report.steps.append(Step(name, ok, seconds, cell(said)[:_MOST_SAID], said[:MOST_KEPT]))
    save()


def _measure_bandwidth(report: Report, save: Callable[[], None]) -> float:
    """Bytes a second of a copy. Where it cannot be measured all is shown as no share of infinity."""

    def measure() -> tuple[bool, str]:
        report.bandwidth = copy_bandwidth()
        torch.cuda.empty_cache()  # for the processes that come
        return True, f"{report.bandwidth / 1e9:.0f} GB/s"

    _attempt(report, save, "bandwidth of a copy", measure)
    return report.bandwidth or math.inf


def _measure_ops(
    report: Report,
    names: Sequence[str],
    counts: Sequence[int],
    deadline: Deadline,
    save: Callable[[], None],
) -> None:
    """The ops of each model."""
    bandwidth = _measure_bandwidth(report, save)
    for name in names:
        shape = ops_run.SHAPES[name]
        found = report.rows.setdefault(shape.name, [])
        measure = partial(
            ops_run.run, shape, bandwidth, counts, found, save, way=apart, deadline=deadline
        )
        _attempt(report, save, f"ops, {name}", measure)


def _measure_engine(
    report: Report,
    names: Sequence[str],
    peers: bool,
    gpt_fast: Path | None,
    deadline: Deadline,
    save: Callable[[], None],
) -> None:
    """What the card takes for mechanisms, then whole models."""
    bandwidth = _measure_bandwidth(report, save)

    def costs() -> tuple[bool | None, str]:
        if deadline.passed:
            return None, deadline.said
        seconds = min(_COSTS_SECONDS, deadline.left / 2)
        report.costs = measure_costs(torch.cuda.get_device_capability(), seconds)
        good = [row for row in report.costs if row.median is not None]
        return True, f"{len(good)} of {len(report.costs)} measured"

    def models() -> tuple[bool | None, str]:
        engine_run.run(
            names,
            bandwidth,
            peers,
            say,
            report.checks,
            report.engines,
            save,
            persistent=persistent_allowed(),
            gpt_fast=gpt_fast,
            way=apart,
            deadline=deadline,
        )
        said = f"{len(report.checks)} checks; {len(report.engines)} ways to run models"
        missing = [what for engine in report.engines for what in engine.left_out]
        late = any(deadline.said in what for what in missing)
        if late or any(check.left_out for check in report.checks):
            return None, f"{said}; the last ones {deadline.said}"
        return True, said

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


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the end of its time is a Ctrl-C
    app()
