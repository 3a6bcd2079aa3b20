"""What this device takes for launches, idle blocks, conditional nodes, barriers and memory; see costs.cu.

The source is compiled where it is needed, by the nvcc of the machine for the device that is there. Whatever keeps it
from being measured becomes a row that says so: the rest of a check goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("costs.cu")
_SECONDS = 180.0  # for each of compiling and running, unless less is asked for
_ALL = "all"  # the key of a row about everything: nothing was measured
_WORDS = {
    _ALL: "costs of mechanisms",
    "stream_launch": "kernel launched into a stream, one behind the other",
    "kernel_node": "kernel node of a graph",
    "kernel_node_overlap": "kernel node, programmatic edges",
    **{
        f"idle_{blocks}{end}": f"idle kernel of {blocks} blocks{words}"
        for end, words in (("", ""), ("_overlap", ", programmatic edges"))
        for blocks in (1, 132, 1000, 4000)
    },
    "if_not_taken": "IF node beside the kernel that decides, not taken",
    "if_taken": "IF node, taken: body of one empty kernel",
    "switch_none": "SWITCH node beside the kernel that decides, no body chosen",
    "switch_taken": "SWITCH node, one of two bodies of an empty kernel",
    "grid_barrier_1": "barrier over the grid, one block a multiprocessor",
    "grid_barrier_4": "barrier over the grid, four blocks a multiprocessor",
    "copy": "copy within the device's memory, read and written",
    "read": "reading the device's memory",
    **{
        f"fetched_{kind}": f"8 MiB read some 16 us after {words}, with that wait"
        for kind, words in (
            ("none", "nothing was asked for"),
            ("lines", "prefetches of 128 bytes into L2"),
            ("bulk", "bulk prefetches into L2"),
        )
    },
    "phase": "dependent phase that reads 32 MiB, beyond its bytes",
    "phase_overlap": "the same, programmatic edges",
}


@dataclass(frozen=True)
class CostRow:
    """A mechanism's cost. unit: us or GB/s. low, high: tenth and ninetieth percentile of the samples. median is None
    where it could not be measured, and `said` tells why."""

    key: str
    unit: str
    median: float | None
    low: float | None
    high: float | None
    said: str = ""

    @property
    def what(self) -> str:
        """The mechanism, in words."""
        return _WORDS.get(self.key, self.key)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "what": self.what}


def find_nvcc() -> str | None:
    """The compiler that CMake would take: CUDACXX, on PATH, or of the toolkit's usual place."""
    folders = [os.environ.get("PATH", "")]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if name in os.environ:
            folders.append(str(Path(os.environ[name]) / "bin"))
    folders.append("/usr/local/cuda/bin")
    return shutil.which(os.environ.get("CUDACXX", "nvcc"), path=os.pathsep.join(folders))


def measure_costs(capability: tuple[int, int], seconds: float = _SECONDS) -> list[CostRow]:
    """Compile and run costs.cu on the first device that is visible, whose compute capability is given; each in so many
    seconds."""
    nvcc = find_nvcc()
    if nvcc is None:
        return [_failed("nvcc was not found: set CUDACXX, or put it on PATH")]
    try:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "costs"
            compile_costs(nvcc, capability, program, seconds)
            return parse(_run([str(program)], "costs", seconds))
    except _Failure as failure:
        return [_failed(str(failure))]


def compile_costs(
    nvcc: str, capability: tuple[int, int], program: Path, seconds: float = _SECONDS
) -> None:
    """Make the program for devices of a compute capability."""
    major, minor = capability
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-o", str(program)]
    _run([*command, str(SOURCE)], "nvcc", seconds)


def parse(output: str) -> list[CostRow]:
    """Rows of what costs.cu printed."""
    try:
        return [_row(row) for row in json.loads(output)["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        return [_failed(f"costs: cannot read its output: {type(error).__name__}: {error}")]


def cost_lines(rows: Sequence[CostRow]) -> list[str]:
    """A table."""
    lines = ["## Costs of mechanisms", "", "| | median | 10% to 90% | |", "|---|--:|--:|---|"]
    for row in rows:
        if row.median is None:
            lines.append(f"| {row.what} | | | not measured: {row.said} |")
        else:
            digits = 0 if row.unit == "GB/s" else 2
            lines.append(
                f"| {row.what} | {row.median:.{digits}f} | {row.low:.{digits}f} to {row.high:.{digits}f} | {row.unit} |"
            )
    return lines


class _Failure(Exception):
    """What kept the costs from being measured."""


def _row(row: dict[str, Any]) -> CostRow:
    samples, key, unit = row["samples"], str(row["key"]), str(row["unit"])
    if not samples:
        return CostRow(key, unit, None, None, None, _one_line(str(row["said"])))
    if not all(isinstance(sample, int | float) for sample in samples):
        raise ValueError(f"samples of {key} are no numbers")
    ordered = sorted(float(sample) for sample in samples)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return CostRow(key, unit, statistics.median(ordered), low, high)


def _failed(said: str) -> CostRow:
    return CostRow(_ALL, "", None, None, None, _one_line(said))


def _run(command: Sequence[str], name: str, seconds: float) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise _Failure(f"{name}: took more than {seconds:.0f} s") from None
    except OSError as error:
        raise _Failure(f"{name}: {error.strerror}") from None
    if result.returncode:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        wrong = [line for line in lines if "error" in line.lower()]
        said = [*wrong[:1], *lines[-1:], f"exit status {result.returncode}"][0]
        raise _Failure(f"{name}: {said}")
    return result.stdout


def _one_line(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.split()).replace("|", "/")[:300]
