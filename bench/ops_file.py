"""Results of `flexidepth bench ops` as text and on disk."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexidepth.plain_json import json_text
from flexidepth_ext import _C

from .load import load_average
from .machine import describe_machine
from .ops import OpRow
from .report import OP_COLUMNS, markdown
from .results_folder import replace_results

_FILES = ("ops.json", "ops.md")


def ops_json(header: dict[str, Any], rows: Sequence[OpRow]) -> str:
    """header: shape, dtype, threads, depth and bandwidth; every sample is in."""
    found = {
        **header,
        "isa": _C.OpContext(1).isa,
        "load_after": load_average(),
        "command": _command(),
    }
    values = [row.to_dict() for row in rows]
    return json_text({**found, "machine": describe_machine(), "ops": values}, indent=1)


def ops_markdown(header: dict[str, Any], rows: Sequence[OpRow]) -> str:
    """The table, with what it was measured on above it."""
    machine, isa = describe_machine(), _C.OpContext(1).isa
    return (
        f"{header['shape']} in {header['dtype']}, {header['threads']} threads, {header['depth']} tokens in the cache, "
        f"on {machine['cpu']}, {machine['cores']} cores ({isa}); {header['read_bandwidth_gb_per_s']:.1f} GB/s; load "
        f"after {load_average():.2f}.\nCommand: `{_command()}`; commit {machine['commit']}.\n\n"
        + markdown(rows, OP_COLUMNS)
    )


def _command() -> str:
    return "flexidepth " + shlex.join(sys.argv[1:])


def write_ops(header: dict[str, Any], rows: Sequence[OpRow], directory: Path) -> list[Path]:
    """ops.json and ops.md in `directory`: both or none."""

    def write(folder: Path) -> None:
        for name, text in zip(
            _FILES, (ops_json(header, rows), ops_markdown(header, rows)), strict=True
        ):
            (folder / name).write_text(text + "\n", encoding="utf-8")

    return replace_results(directory, write, _FILES)
