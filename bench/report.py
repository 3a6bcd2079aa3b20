"""Tables out of rows: Markdown, CSV, aligned text."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

Columns = Sequence[tuple[str, str, str]]  # (field, heading, format)

DECODE_COLUMNS: Columns = (
    ("name", "decode", ""),
    ("threads", "threads", "d"),
    ("tps_mean", "tok/s", ".1f"),
    ("tps_std", "±", ".1f"),
    ("ms_median", "ms/token p50", ".2f"),
    ("ms_p99", "p99", ".2f"),
    ("gb_per_s", "GB/s", ".1f"),
    ("speedup", "x dense", ".3f"),
    ("ideal", "ideal", ".3f"),
    ("of_ideal", "of ideal", ".3f"),
)

DEMO_COLUMNS: Columns = (
    ("name", "layers skipped", ""),
    ("tps_median", "tok/s", ".1f"),
    ("speedup", "x dense", ".2f"),
    ("ideal", "ideal", ".2f"),
    ("of_ideal", "of ideal", ".2f"),
)

PROMPT_COLUMNS: Columns = (
    ("name", "prompt", ""),
    ("threads", "threads", "d"),
    ("tokens", "tokens", "d"),
    ("s_median", "s p50", ".3f"),
    ("tps", "tok/s", ".0f"),
    ("gflop_per_s", "GFLOP/s", ".0f"),
    ("speedup", "x dense", ".3f"),
    ("ideal", "ideal (FLOP)", ".3f"),
    ("of_ideal", "of ideal", ".3f"),
)


def cell(value: Any, spec: str) -> str:
    """One value as text; an absent one is a dash."""
    return "-" if value is None else format(value, spec)


def markdown(rows: Sequence[Any], columns: Columns) -> str:
    """A Markdown table of dataclass rows."""
    lines = ["| " + " | ".join(heading for _, heading, _ in columns) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(columns))) + "|")
    for row in rows:
        lines.append(
            "| " + " | ".join(cell(getattr(row, f), spec) for f, _, spec in columns) + " |"
        )
    return "\n".join(lines)


def csv_text(rows: Sequence[Any], columns: Columns) -> str:
    """The same columns as CSV, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(field for field, _, _ in columns)
    for row in rows:
        writer.writerow("" if getattr(row, f) is None else getattr(row, f) for f, _, _ in columns)
    return out.getvalue()


def table(rows: Sequence[Any], columns: Columns) -> str:
    """The same columns aligned for a terminal."""
    cells = [[heading for _, heading, _ in columns]]
    cells += [[cell(getattr(row, f), spec) for f, _, spec in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(lines)
