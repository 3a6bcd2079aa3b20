"""The study in words and tables: the blocks of docs/scaling.md. Every number comes out of its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .findings import decode_row, findings
from .study import half


def blocks(study: dict[str, Any]) -> dict[str, str]:
    """{name: Markdown}; study: the values of `make_study`, as its JSON has them."""
    return {
        "devices": _devices(study),
        "models": _models(study),
        "errors": _errors(study),
        "published": _published(study),
        "speeds": _speeds(study),
        "findings": findings(study),
        "context": _context(study),
        "batches": _batches(study),
    }


def report(study: dict[str, Any]) -> str:
    """All blocks under headings of their own."""
    parts = ["# Skipping on paper"]
    for name, text in blocks(study).items():
        parts += [f"## {name.capitalize()}", text]
    return "\n\n".join(parts)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first `words` columns are text, the others numbers."""
    rule = "|".join("---" if i < words else "--:" for i in range(len(headings)))
    lines = [f"| {' | '.join(headings)} |", f"|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _devices(study: dict[str, Any]) -> str:
    rows = [
        [
            d["name"],
            f"{d['bandwidth']:,g}",
            f"{d['share']:.0%}",
            f"{d['latency']['phase_us']:g} and {d['latency']['idle_us']:g}",
            f"{d['teraflops']:g}",
            f"{d['memory']:g}",
            d["source"],
        ]
        for d in study["devices"]
    ]
    headings = [
        "device",
        "GB/s",
        "reached",
        "us a phase, working and idle",
        "TFLOP/s",
        "GB",
        "source of the published figures",
    ]
    lines = table(headings, rows)
    return f"{lines}\n\nPrompts are taken to reach {study['flop_share']:.0%} of the arithmetic."


def _models(study: dict[str, Any]) -> str:
    rows = [
        [
            m["model"],
            f"{m['routed']} of {m['layers']}",
            f"{m['full_layer_mb']:.2f}",
            f"{m['skip_path_mb']:.2f}",
            f"{m['routers_mb']:.1f}",
            f"{m['head_mb']:.1f}",
            *(f"{m['dense_gb'][p]:.2f}" for p in ("bf16", "int8", "int4")),
        ]
        for m in study["models"]
    ]
    headings = ["model", "routed", "full layer, MB", "skip path, MB", "routers, MB", "LM head, MB"]
    return table([*headings, "dense token, GB", "int8", "int4"], rows)


def _errors(study: dict[str, Any]) -> str:
    rows = []
    for one in study["measured"]["series"]:
        share = "" if one["share"] is None else f"{one['share']:.0%}"
        spreads = [p["spread"] for p in one["points"] if p["spread"] is not None]
        spread = f"{sum(spreads) / len(spreads):.1%}" if spreads else ""
        label = f"{one['machine']}, {one['setting']}, {one['kind']}"
        rows.append([label, *_error_cells(one["errors"]), share, spread])
    for kind, errors in study["measured"]["pooled"].items():
        if errors:
            rows.append([f"**all, {kind}**", *_error_cells(errors), "", ""])
    headings = [
        "mean and largest error",
        "points",
        "time, nothing fitted",
        "speed-up, nothing fitted",
        "time, dense row given",
        "of the bandwidth, dense",
        "spread of the samples",
    ]
    text = table(headings, rows)
    refused = study["measured"]["refused"]
    if refused:
        lines = [f"- {one['file']}: {one['why']}" for one in refused]
        return "\n".join([text, "", "Not compared:", "", *lines])
    return f"{text}\n\nNo file of measurements was left out."


def _error_cells(errors: dict[str, dict[str, float]]) -> list[str]:
    cells = [f"{max(e['points'] for e in errors.values()):.0f}"]
    for name in ("fixed", "fixed_speedup", "fitted"):
        one = errors.get(name)
        cells.append("" if one is None else f"{one['mean']:.1%}, {one['max']:.1%}")
    return cells


def _published(study: dict[str, Any]) -> str:
    rows = [
        [
            p["source"],
            p["device"],
            p["model"],
            p["precision"],
            f"{p['tokens_per_second']:.0f}",
            f"{p['predicted']:.0f}",
            f"{p['error']:+.0%}",
        ]
        for p in study["published"]
    ]
    headings = ["source", "device", "model", "weights", "tok/s", "model's", "error of the time"]
    return table(headings, rows, words=4)


def _speeds(study: dict[str, Any]) -> str:
    devices = [d["name"] for d in study["devices"]]
    shown = ("bf16", "int8", "int4", "int4, head bf16")
    rows = []
    for model in study["models"]:
        for precision in shown:
            cells = []
            for device in devices:
                row = decode_row(study, device, model["model"], precision)
                if not row["fits"]:
                    cells.append(f"needs {row['resident_gb']:.0f} GB")
                    continue
                cells.append(
                    f"{_rate(1e3 / row['dense_ms'])}: {half(row['speedup']):.2f}, {row['speedup'][-1]:.2f}"
                )
            ideal = next(
                (
                    r
                    for r in study["decode"]
                    if r["fits"] and (r["model"], r["precision"]) == (model["model"], precision)
                ),
                None,
            )
            limit = "" if ideal is None else f"{half(ideal['ideal']):.2f}, {ideal['ideal'][-1]:.2f}"
            rows.append([f"{model['model']}, {precision}", *cells, limit])
    return table(["dense tok/s: times that at half, at all", *devices, "by bytes alone"], rows)


def _rate(tokens_per_second: float) -> str:
    """Three digits or more, never an exponent."""
    digits = 2 if tokens_per_second < 10 else 1 if tokens_per_second < 100 else 0
    return f"{tokens_per_second:,.{digits}f}"


def _context(study: dict[str, Any]) -> str:
    contexts = list(dict.fromkeys(c["context"] for c in study["contexts"]))
    labels = list(dict.fromkeys((c["model"], c["precision"]) for c in study["contexts"]))
    rows = []
    for label in labels:
        own = [c for c in study["contexts"] if (c["model"], c["precision"]) == label]
        cells = [f"{c['ideal']:.2f} ({c['cache_share']:.0%})" for c in own]
        rows.append([", ".join(label), *cells])
    return table(
        ["ideal at half (cache's share of dense)", *(f"{c:,} tokens" for c in contexts)], rows
    )


def _batches(study: dict[str, Any]) -> str:
    routings = ("alike", "by layer", "recorded")
    levels = study["recording"]["levels"]
    models = list(study["batches"][0]["ideal"])
    rows = []
    for level, recorded in levels.items():
        for size in dict.fromkeys(b["rows"] for b in study["batches"]):
            own = {
                b["routing"]: b
                for b in study["batches"]
                if (b["level"], b["rows"]) == (level, size)
            }
            rows.append(
                [
                    f"{level}, {recorded['skipped']:.1f} skipped",
                    str(size),
                    *(f"{own[r]['running']:.1f}" for r in routings),
                    *(f"{own[r]['ideal'][m]:.2f}" for m in models for r in ("alike", "recorded")),
                ]
            )
    headings = ["dial, layers skipped a token", "batch", *(f"layers read, {r}" for r in routings)]
    headings += [f"ideal, {m}, {r}" for m in models for r in ("alike", "recorded")]
    worst = max(
        (
            abs(b["running"] - b["simulated"]) / b["standard_error"]
            for b in study["batches"]
            if b["standard_error"]
        ),
        default=0.0,
    )
    recorded = ", ".join(
        f"{one['decoded_tokens']:,} tokens of {one['sequences']} answers at {level}"
        for level, one in levels.items()
    )
    return (
        f"{table(headings, rows)}\n\nRecorded: {recorded} by `{study['recording']['command']}`. "
        f"{study['draws']:,} simulated steps for each line agree with the closed forms within {worst:.1f} "
        "standard errors."
    )
