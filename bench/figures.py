"""Speed against layers skipped, prompts against the share skipped, and where the time of a layer goes, as figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flexidepth.errors import CheckpointError
from flexidepth.plots import new_figure, plain_text

from .breakdown import PARTS
from .results_file import LoadedResult
from .rows import DECODE, DENSE, PROMPT, BenchRow

_COLOURS = ("#7570b3", "#1b9e77", "#66a61e", "#e6ab02", "#d95f02", "#e7298a")  # of PARTS


def figures(result: LoadedResult) -> dict[str, Any]:
    """{"decode": figure, "prompt": figure, "breakdown": figure}, of what the result has.

    FlexiDepthError where matplotlib is missing.
    """
    made = {}
    if _lines(result.rows, DECODE):
        made["decode"] = decode_figure(result)
    if _lines(result.rows, PROMPT):
        made["prompt"] = prompt_figure(result)
    if result.breakdown:
        made["breakdown"] = breakdown_figure(result)
    return made


def decode_figure(result: LoadedResult) -> Any:
    """Tokens per second against layers skipped, with the ideal line and the peers' dense lines.

    CheckpointError where the result has no such rows.
    """
    lines = _lines(result.rows, DECODE)
    if not lines:
        raise CheckpointError(
            "plot: the benchmark has no decode rows with layers skipped; run it with -n above 0"
        )
    figure, axis = new_figure(7, 4.5)
    for rows in lines:
        name = _setting(rows[0], lines)
        dense = next(row for row in rows if row.name == DENSE)
        ours = _ours(rows)
        skipped = [row.skip_got for row in ours]
        (line,) = axis.plot(skipped, [row.tps_median for row in ours], "o-", label=name)
        ideal = [(dense.tps_median or 0.0) * (row.ideal or 0.0) for row in ours]
        axis.plot(skipped, ideal, "--", color=line.get_color(), label=f"ideal by bytes, {name}")
        reads = [(dense.tps_median or 0.0) * (row.ideal_reads or 0.0) for row in ours]
        if any(reads):
            axis.plot(skipped, reads, ":", color=line.get_color(), label=f"by reads, {name}")
        _draw_peers(axis, rows, lambda row: row.tps_median or 0.0, line.get_color(), name)
    axis.set_xlabel("layers skipped per token")
    axis.set_ylabel("tokens per second")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    axis.set_title(_title("decode", result, lines), fontsize=9)
    return figure


def prompt_figure(result: LoadedResult) -> Any:
    """Seconds of a prompt against the share of the routed layers that its tokens skip, with what arithmetic allows.

    CheckpointError where the result has no such rows.
    """
    lines = _lines(result.rows, PROMPT)
    if not lines:
        raise CheckpointError(
            "plot: the benchmark has no prompts with layers skipped; run it with -p above 0"
        )
    figure, axis = new_figure(7, 4.5)
    for rows in lines:
        name = f"{rows[0].test}, {_setting(rows[0], lines)}"
        dense = next(row for row in rows if row.name == DENSE)
        routed = result.models[rows[0].model]["routed_layers"]
        ours = _ours(rows)
        shares = [100 * (row.skip_got or 0.0) / routed for row in ours]
        (line,) = axis.plot(
            shares, [(row.ms_median or 0.0) / 1e3 for row in ours], "o-", label=name
        )
        ideal = [(dense.ms_median or 0.0) / 1e3 / (row.ideal or 1.0) for row in ours]
        axis.plot(shares, ideal, "--", color=line.get_color(), label=f"by arithmetic, {name}")
        axis.plot([0], [(dense.ms_median or 0.0) / 1e3], "*", color=line.get_color())
        _draw_peers(axis, rows, lambda row: (row.ms_median or 0.0) / 1e3, line.get_color(), name)
    axis.set_xlabel("routed layers skipped by each token, per cent (star: dense, without routers)")
    axis.set_ylabel("seconds")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    axis.set_title(_title("prompt", result, lines), fontsize=9)
    return figure


def breakdown_figure(result: LoadedResult) -> Any:
    """A bar for each kind of layer, for each thread count and depth: microseconds by part.

    CheckpointError where the result has none.
    """
    if not result.breakdown:
        raise CheckpointError("plot: the benchmark has no breakdown; run it with --breakdown")
    bars = [
        (f"{layer['layer']}, {b['threads']} threads, d{b['depth']}", layer)
        for b in result.breakdown
        for layer in b["layers"]
    ]
    figure, axis = new_figure(8, 1.2 + 0.4 * len(bars))
    left = [0.0] * len(bars)
    for part, colour in zip(PARTS, _COLOURS, strict=True):
        widths = [1e3 * layer["parts"][part] for _, layer in bars]
        axis.barh(range(len(bars)), widths, left=left, color=colour, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    bytes_alone = [1e3 * layer["by_bytes"] for _, layer in bars]
    axis.plot(bytes_alone, range(len(bars)), "k|", markersize=14, label="its bytes alone")
    axis.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("microseconds of a layer, one token")
    axis.legend(fontsize=8)
    axis.set_title(plain_text(f"where the time goes, {result.machine['cpu']}"), fontsize=9)
    return figure


def _draw_peers(
    axis: Any, rows: Sequence[BenchRow], height: Callable[[BenchRow], float], colour: str, name: str
) -> None:
    """A level for each peer that was measured."""
    for row in rows:
        if row.peer and row.ms_median is not None:
            axis.axhline(height(row), color=colour, linewidth=0.8, alpha=0.6)
            axis.annotate(f"{row.name}, {name}", (0, height(row)), fontsize=7, va="bottom")


def _lines(rows: Sequence[BenchRow], kind: str) -> list[list[BenchRow]]:
    """Groups of rows of a kind that have our dense pass and a number of layers skipped."""
    groups: dict[tuple[Any, ...], list[BenchRow]] = {}
    for row in rows:
        if row.kind == kind and row.ms_median is not None:
            groups.setdefault(row.group, []).append(row)
    return [
        group for group in groups.values() if _ours(group) and any(r.name == DENSE for r in group)
    ]


def _ours(rows: Sequence[BenchRow]) -> list[BenchRow]:
    own = [row for row in rows if row.skip_got is not None and not row.peer]
    return sorted(own, key=lambda row: row.skip_got or 0.0)


def _setting(row: BenchRow, lines: Sequence[Sequence[BenchRow]]) -> str:
    """What tells a line from the others."""
    parts = []
    if row.threads is not None:
        parts.append(f"{row.threads} thread" + ("s" if row.threads > 1 else ""))
    else:
        parts.append(row.device)
    for field in ("model", "dtype", "batch", "test"):
        if len({getattr(line[0], field) for line in lines}) > 1:
            value = getattr(row, field)
            parts.append(f"{value} sequences" if field == "batch" else str(value))
    return ", ".join(parts)


def _title(what: str, result: LoadedResult, lines: Sequence[Sequence[BenchRow]]) -> str:
    models = ", ".join(dict.fromkeys(line[0].model for line in lines))
    dtypes = ", ".join(dict.fromkeys(line[0].dtype for line in lines))
    return plain_text(f"{what}, {models}, {dtypes}, {result.machine['cpu']}")
