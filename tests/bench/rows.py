"""Rows of results, made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexidepth.bench.results_file import LoadedResult
from flexidepth.bench.rows import DECODE, PROMPT, BenchRow, with_comparisons


def decode_row(
    name: str, ms: float | None, skipped: float | None = None, **changes: Any
) -> BenchRow:
    """A row of four rounds with one step each, whose times are equal unless `samples` are given."""
    values: dict[str, Any] = {
        "model": "a $model$",
        "device": "cpu",
        "dtype": "bfloat16",
        "threads": 2,
        "batch": 1,
        "kind": DECODE,
        "test": "tg4 @ d8",
        "name": name,
        "ms_median": ms,
        "skip_asked": skipped,
        "skip_got": skipped,
        "samples": [] if ms is None else [ms / 1e3] * 4,
        "blocks": [1] * 4,
    }
    return BenchRow(**{**values, **changes})


def decode_rows(**changes: Any) -> list[BenchRow]:
    """Dense, two numbers of layers skipped, and a peer."""
    return with_comparisons(
        [
            decode_row("dense", 10.0, **changes),
            decode_row("skip 15", 6.5, 15, ideal=1.531, **changes),
            decode_row("skip 0", 10.1, 0, ideal=0.995, **changes),
            decode_row("peer", 20.0, peer=True, **changes),
        ]
    )


def prompt_rows() -> list[BenchRow]:
    """Dense, none and all of 15 layers skipped."""
    shared: dict[str, Any] = {"kind": PROMPT, "test": "pp100"}
    return with_comparisons(
        [
            decode_row("dense", 800.0, **shared),
            decode_row("skip 0", 800.0, 0, ideal=1.0, **shared),
            decode_row("skip 15", 500.0, 15, ideal=1.6, **shared),
        ]
    )


def loaded(rows: Sequence[BenchRow], cpu: str = "some processor", **changes: Any) -> LoadedResult:
    """A result with these rows."""
    values: dict[str, Any] = {
        "format": "flexidepth-bench-3",
        "rows": list(rows),
        "machine": {"cpu": cpu, "cores": 2},
        "models": {"a $model$": {"num_layers": 30, "routed_layers": 15}},
        "breakdown": [],
        "commit": "abc",
        "accuracy": {},
        "memory": {},
    }
    return LoadedResult(**{**values, **changes})
