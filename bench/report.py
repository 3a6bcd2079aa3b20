"""Tables out of rows: Markdown, CSV, aligned text."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from .rows import DECODE, BenchRow

# (field, or what gives the value, heading, format)
Column = tuple[str | Callable[[Any], Any], str, str]
Columns = Sequence[Column]


def _marked(row: BenchRow) -> str:
    return f"{row.name} (noisy)" if row.noisy else row.name


_LAYERS: Columns = (("skip_asked", "asked", ".3g"), ("skip_got", "got", ".2f"))
_LIMITS: Columns = (
    ("speedup", "x dense", ".3f"),
    ("ideal", "ideal", ".3f"),
    ("of_ideal", "of ideal", ".3f"),
)
_ANSWERS: Columns = (
    ("logits_rmse", "logits RMSE", ".4f"),
    ("gate_agreement", "gates equal", ".2%"),
    ("peak_mb", "peak MB", ".0f"),
)
DECODE_COLUMNS: Columns = (
    (_marked, "decode", ""),
    *_LAYERS,
    ("tps_mean", "tok/s", ".1f"),
    ("tps_std", "±", ".1f"),
    ("ms_median", "ms p50", ".2f"),
    ("ms_p99", "p99", ".2f"),
    ("work", "GB/s", ".1f"),
    ("work_share", "of a read's", ".0%"),
    *_LIMITS,
    ("ideal_reads", "ideal by reads", ".3f"),
    ("of_reads", "of it", ".3f"),
)
PROMPT_COLUMNS: Columns = (
    (_marked, "prompt", ""),
    *_LAYERS,
    ("tps_mean", "tok/s", ".0f"),
    ("tps_std", "±", ".0f"),
    ("ms_median", "ms p50", ".0f"),
    ("work", "GFLOP/s", ".0f"),
    *_LIMITS,
)
DEMO_COLUMNS: Columns = (
    ("name", "layers skipped", ""),
    ("tps_median", "tok/s", ".1f"),
    ("speedup", "x dense", ".2f"),
    ("ideal", "ideal", ".2f"),
    ("of_ideal", "of ideal", ".2f"),
    ("ideal_reads", "ideal by reads", ".2f"),
)
OP_COLUMNS: Columns = (
    ("name", "op", ""),
    ("what", "shape", ""),
    ("rows", "rows", "d"),
    ("us_median", "us p50", ".1f"),
    ("us_p99", "p99", ".1f"),
    ("megabytes", "MB", ".2f"),
    ("gb_per_s", "GB/s", ".1f"),
    ("bandwidth_share", "of bandwidth", ".0%"),
    ("gflop_per_s", "GFLOP/s", ".0f"),
)


def tables(rows: Sequence[BenchRow]) -> Iterator[tuple[str, list[BenchRow], list[Column]]]:
    """(title, rows, columns) of each group of rows that were measured in turn."""
    for _, members in groupby(rows, key=lambda row: row.group):
        group = list(members)
        yield _title(group[0]), group, _columns(group)


def _title(row: BenchRow) -> str:
    parts = [row.test]
    if row.threads is not None:
        parts.append(f"{row.threads} thread" + ("s" if row.threads > 1 else ""))
    if row.kind == DECODE and row.batch > 1:
        parts.append(f"{row.batch} sequences")
    return ", ".join([f"{row.model}, {row.dtype}, {row.device}", *parts])


def _columns(rows: Sequence[BenchRow]) -> list[Column]:
    """Those of the kind, a column for each peer, and of the rest those that have values."""
    own = DECODE_COLUMNS if rows[0].kind == DECODE else PROMPT_COLUMNS
    first, *others = own
    columns: list[Column] = [(first[0], rows[0].test, first[2]), *others]
    for peer in dict.fromkeys(name for row in rows for name in row.over_peers):
        columns.append(
            (lambda row, name=peer: row.over_peers.get(name), f"x {peer}", ".2f")  # type: ignore[misc]
        )
    columns += [c for c in _ANSWERS if any(value(row, c) is not None for row in rows)]
    if any(row.said for row in rows):
        columns.append((lambda row: row.said, "", ""))
    return columns


def value(row: Any, column: Column) -> Any:
    """A row's value in a column."""
    source = column[0]
    return getattr(row, source) if isinstance(source, str) else source(row)


def cell(found: Any, spec: str) -> str:
    """One value as text; an absent one is a dash."""
    return "-" if found is None else format(found, spec).replace("|", "/")


def markdown(rows: Sequence[Any], columns: Columns) -> str:
    """A Markdown table of rows."""
    lines = ["| " + " | ".join(heading for _, heading, _ in columns) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(columns))) + "|")
    for row in rows:
        lines.append("| " + " | ".join(cell(value(row, c), c[2]) for c in columns) + " |")
    return "\n".join(lines)


def csv_text(rows: Sequence[BenchRow]) -> str:
    """Every field but the samples, unrounded; all rows in one table."""
    fields = [f.name for f in dataclasses.fields(BenchRow) if f.name not in ("samples", "blocks")]
    peers = list(dict.fromkeys(name for row in rows for name in row.over_peers))
    fields.remove("over_peers")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*fields, "noisy", *(f"over {peer}" for peer in peers)])
    for row in rows:
        values = [getattr(row, name) for name in fields]
        values += [row.noisy, *(row.over_peers.get(peer) for peer in peers)]
        writer.writerow("" if v is None else v for v in values)
    return out.getvalue()


def table(rows: Sequence[Any], columns: Columns) -> str:
    """The same columns aligned for a terminal."""
    cells = [[heading for _, heading, _ in columns]]
    cells += [[cell(value(row, c), c[2]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w)
            for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(lines)
