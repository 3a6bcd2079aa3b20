"""Tables of committed benchmarks: tokens per second, where a token's time goes, how near the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexidepth.errors import CheckpointError

from .breakdown import table_rows
from .markdown import markdown_table
from .results_file import LoadedResult, read_results
from .rows import DECODE, DENSE, PROMPT, BenchRow

_MOST_SHOWN = 5  # numbers of layers skipped in a table of speeds


def decode_table(path: Path) -> str:
    """Tokens per second, speed over dense and what mere reads allow, for each thread count; what bytes allow."""
    result = read_results(path)
    columns = _columns(result, DECODE)
    routed = max(sizes["routed_layers"] for sizes in result.models.values())
    heading = [""]
    for rows in columns:
        heading += [f"{_threads(rows[0].threads)}, tok/s", "x dense", "by reads"]
    cells = [[*heading, "by bytes"]]
    for name in _shown(columns[0]):
        found = [next((row for row in rows if row.name == name), None) for rows in columns]
        texts = [
            text
            for row in found
            for text in (
                _rate(row, ".1f"),
                _number(row, "speedup", ".2f"),
                _number(row, "ideal_reads", ".2f").strip("-"),
            )
        ]
        cells.append([_named(found, routed), *texts, _number(found[0], "ideal", ".2f").strip("-")])
    return "\n\n".join([markdown_table(cells), _decode_summary(columns)])


def _decode_summary(columns: Sequence[Sequence[BenchRow]]) -> str:
    """How near to both ideals, how near to a mere read's rate, how much faster than each peer."""
    sentences = []
    for rows in columns:
        shares = [row.of_ideal for row in rows if row.of_ideal is not None]
        dense = next(row for row in rows if row.name == DENSE)
        reads = [row.of_reads for row in rows if row.of_reads is not None]
        work = [row.work_share for row in rows if row.work_share is not None]
        by_reads = f"{min(reads):.2f} to {max(reads):.2f} of the ideal by reads, " if reads else ""
        over = ", ".join(f"{ratio:.2f} x {name}" for name, ratio in dense.over_peers.items())
        threads = _threads(rows[0].threads)
        sentences.append(
            f"On {threads}: {by_reads}{min(shares):.2f} to {max(shares):.2f} of that by bytes at {len(shares)} numbers "
            f"of layers"
            + (
                f"; it reads at {min(work):.0%} to {max(work):.0%} of the rate of a mere read"
                if work
                else ""
            )
            + (f"; dense {over}." if over else ".")
        )
    return "\n".join(sentences)


def prompt_table(path: Path) -> str:
    """Tokens per second of prompts: a column for each thread count and length."""
    result = read_results(path)
    columns = _columns(result, PROMPT)
    routed = max(sizes["routed_layers"] for sizes in result.models.values())
    heading = [""]
    for rows in columns:
        heading += [f"{rows[0].test}, {_threads(rows[0].threads)}, tok/s", "x dense"]
    cells = [[*heading, "ideal by arithmetic"]]
    for name in dict.fromkeys(row.name for rows in columns for row in rows):
        found = [next((row for row in rows if row.name == name), None) for rows in columns]
        pairs = [
            text for row in found for text in (_rate(row, ",.0f"), _number(row, "speedup", ".2f"))
        ]
        cells.append([_named(found, routed), *pairs, _number(found[0], "ideal", ".2f").strip("-")])
    return markdown_table(cells)


def breakdown_table(path: Path) -> str:
    """Microseconds of a layer by part, and beside what its bytes alone would take; what that makes of a token."""
    result = read_results(path)
    if not result.breakdown:
        raise CheckpointError(
            "readme: the result has no breakdown; run the benchmark with --breakdown"
        )
    sentences = [_saved(found, result) for found in result.breakdown]
    return "\n\n".join([markdown_table(table_rows(result.breakdown)), "\n".join(sentences)])


def answers_table(path: Path) -> str:
    """In words: how near the answers are to float32, how fast a model loads, how much memory it takes."""
    result = read_results(path)
    accuracy = next(iter(result.accuracy.values()), None)
    memory = next(iter(result.memory.values()), None)
    if accuracy is None or memory is None:
        raise CheckpointError(
            "readme: the result lacks accuracy or memory; run the benchmark with --accuracy, and without --no-memory"
        )
    return (
        f"Answers: root mean square error of the logits against float32 {accuracy['engine_dense_rmse']:.3f}, of "
        f"transformers in the same type {accuracy['torch_rmse']:.3f}; the same first choice for "
        f"{accuracy['top1_agreement']:.1%} of {accuracy['tokens']} tokens. Loading takes {memory['load_s']:.1f} s; "
        f"peak memory is {memory['peak_over_weights_and_cache']:.2f} x weights and cache."
    )


def _saved(found: dict[str, Any], result: LoadedResult) -> str:
    """What skipping every routed layer saves of a token, in all and by part."""
    layers = {layer["layer"]: layer for layer in found["layers"]}
    total = {name: sum(layer["parts"].values()) for name, layer in layers.items()}
    count = layers["skipped"]["count"]
    parts = {
        "in the skipped layers": count * (total["run"] - total["skipped"]),
        "in the LM head": found["head_ms"][0] - found["head_ms"][1],
        "elsewhere": found["other_ms"][0] - found["other_ms"][1],
    }
    if "plain" in layers:
        kept = total["plain"] - total["plain, others skipped"]
        parts["in the layers that always run"] = layers["plain"]["count"] * kept
    worth = count * (layers["run"]["by_bytes"] - layers["skipped"]["by_bytes"])
    threads = found["threads"]
    rows = {
        row.skip_asked: row.ms_median
        for row in result.rows
        if (row.model, row.dtype, row.threads, row.batch, row.kind)
        == (found["model"], found["dtype"], threads, 1, DECODE)
        and row.test.endswith(f" d{found['depth']}")
    }
    measured = ""
    if rows.get(0) is not None and rows.get(count) is not None:
        measured = f" ({(rows[0] or 0.0) - (rows[count] or 0.0):.2f} in the table of decoding)"
    return (
        f"On {_threads(threads)} skipping all {count} saves {sum(parts.values()):.2f} ms of a "
        f"token{measured}, where their bytes are worth {worth:.2f} at the dense pass's rate: "
        + ", ".join(f"{value:.2f} {where}" for where, value in parts.items())
        + "."
    )


def _threads(count: int | None) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _columns(result: LoadedResult, kind: str) -> list[list[BenchRow]]:
    """Groups of a kind, one sequence each; CheckpointError where there is none."""
    groups: dict[tuple[Any, ...], list[BenchRow]] = {}
    for row in result.rows:
        if row.kind == kind and row.batch == 1 and row.ms_median is not None:
            groups.setdefault(row.group, []).append(row)
    if not groups:
        raise CheckpointError(f"readme: the result has no rows of {kind}")
    return list(groups.values())


def _shown(rows: Sequence[BenchRow]) -> list[str]:
    """Dense, some numbers of layers from the least to the most, peers."""
    ours = [row.name for row in rows if row.skip_asked is not None]
    wanted = min(_MOST_SHOWN, len(ours))
    picked = [ours[round(i * (len(ours) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    return [DENSE, *picked, *(row.name for row in rows if row.peer)]


def _named(rows: Sequence[BenchRow | None], routed: int) -> str:
    row = next(row for row in rows if row is not None)
    if row.peer:
        return row.name
    if row.skip_asked is None:
        return "ours, dense"
    if row.skip_asked == 0:
        return "ours, every layer run"
    return f"ours, {row.skip_asked:g} of {routed} routed layers skipped"


def _rate(row: BenchRow | None, spec: str) -> str:
    """Tokens per second, and whether they were noisy."""
    text = _number(row, "tps_median", spec)
    return f"{text} (noisy)" if row is not None and row.noisy else text


def _number(row: BenchRow | None, field: str, spec: str) -> str:
    value = None if row is None else getattr(row, field)
    return "-" if value is None else format(value, spec)
