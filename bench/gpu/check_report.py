"""What `gpu_check` writes: JSON, tables and, of the engine, a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexidepth.cli.common import say
from flexidepth.plain_json import json_text
from flexidepth.plots import save_figure

from ..models import model_config
from ..results_folder import replace_results
from .check_steps import Step
from .costs import CostRow, cost_lines
from .engine_check import EngineCheck
from .engine_report import (
    EngineReport,
    check_lines,
    engine_figure,
    engine_lines,
    prediction_lines,
)
from .predictions import Beside, assumed_devices, beside
from .timing import OpRow

FILES = ("gpu_check.json", "gpu_check.md", "gpu_check.png")


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
        return steps and engines and all(check.ok is not False for check in self.checks)

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
    if report.rows:
        lines += [
            "",
            "Every time is the median of replays of a CUDA graph that runs the op in turn on copies of its weights, "
            "which together exceed every cache. The bytes are those of weights, or of keys and values.",
        ]
    for step in report.steps:
        if step.first_failure:
            lines += ["", f"## First failure of {step.name}", "", "~~~", step.first_failure, "~~~"]
    return "\n".join(lines) + "\n"


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
