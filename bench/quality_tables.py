"""Tables of committed evaluations: quality against layers skipped, and variants against bytes read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexidepth.errors import CheckpointError

from .markdown import markdown_table

_METHODS = {
    "flexidepth": "trained routers",
    "dial": "the dial, as asked by users",
    "static-adapters": "the same layers for every token, with the trained adapters",
    "random-adapters": "at random per token with the trained adapters",
    "shortgpt": "ShortGPT, lowest block influence of all layers",
    "shortgpt-routed": "ShortGPT of the routed layers alone",
    "random": "at random per token, without adapters",
}
_SUBJECTS = {"chat": "conversations", "distilled": "the base model's own answers"}
_VARIANTS = {
    "flexidepth": "whole (adapter ffn/8, last 15 layers)",
    "no skipped KV": "no keys and values of skipped tokens",
    "no skipped KV but the first": "no keys and values of skipped tokens but a text's first",
    "attention only": "attention alone is skipped",
    "feed-forward only": "feed-forward alone is skipped",
}


def quality_table(path: Path) -> str:
    """Perplexity, times the base model's, at the layers really skipped: on all texts, of layers skipped at random on
    prose. ShortGPT of the routed layers alone is left to the whole report."""
    rows = [row for row in _evaluation(path) if row["part"] == "text" and row["method"] != "base"]
    asked = sorted({row["asked"] for row in rows})
    cells = [["layers skipped, asked", *(f"{n:g}" for n in asked)]]
    for method, title in _METHODS.items():
        if method == "shortgpt-routed":
            continue
        subjects = list(dict.fromkeys(r["subject"] for r in rows if r["method"] == method))
        for i, subject in enumerate(subjects[:1] if method.startswith("random") else subjects):
            own = {r["asked"]: r for r in rows if (r["method"], r["subject"]) == (method, subject)}
            name = _SUBJECTS.get(subject, subject)
            texts = [_ratio(own.get(n), at=method in ("flexidepth", "dial")) for n in asked]
            cells.append([f"{title}: {name}" if i == 0 else name, *texts])
    return markdown_table(cells)


def _ratio(row: dict[str, Any] | None, at: bool) -> str:
    if row is None or row["ratio"] is None:
        return "-"
    ratio = format(
        row["ratio"], ".2f" if row["ratio"] < 10 else ".1f" if row["ratio"] < 100 else ".0f"
    )
    return f"{ratio} at {row['skipped']:.1f}" if at else ratio


def tasks_table(path: Path) -> str:
    """Mean acc_norm of the sets of questions."""
    rows = [row for row in _evaluation(path) if row["part"] == "task"]
    asked = sorted({row["asked"] for row in rows})
    cells = [["layers skipped, asked", *(f"{n:g}" for n in asked)]]
    base = [row["acc_norm"] for row in rows if row["method"] == "base"]
    for method, title in _METHODS.items():
        if not any(row["method"] == method for row in rows):
            continue
        texts = []
        for n in asked:
            own = [r["acc_norm"] for r in rows if (r["method"], r["asked"]) == (method, n)]
            own = own or (base if n == 0 and method == "flexidepth" else [])
            texts.append(f"{100 * sum(own) / len(own):.1f}" if own else "")
        cells.append([title.split(",")[0], *texts])
    cells[1][1] += " %"
    return markdown_table(cells)


def bytes_table(path: Path, subject: str) -> str:
    """Variants of a model on one set of texts: perplexity, times the base model's, at the MB that a token reads."""
    rows = [
        row
        for row in _evaluation(path)
        if (row["part"], row["subject"]) == ("text", subject) and row["method"] != "base"
    ]
    asked = sorted({row["asked"] for row in rows})
    cells = [["layers to skip", *(f"{n:g}" for n in asked)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["asked"]: row for row in rows if row["method"] == method}
        texts = [
            f"{_ratio(own[n], at=False)} at {own[n]['bytes_per_token'] / 1e6:.0f}"
            if n in own
            else "-"
            for n in asked
        ]
        cells.append([_VARIANTS.get(method, method), *texts])
    return markdown_table(cells)


def variant_tasks_table(path: Path) -> str:
    """Variants of a model: mean acc_norm of the sets of questions, the base model's in the heading."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in _evaluation(path):
        if row["part"] == "task":
            found.setdefault((row["method"], row["asked"]), []).append(row["acc_norm"])
    means = {key: 100 * sum(own) / len(own) for key, own in found.items()}
    if ("base", 0.0) not in means:
        raise CheckpointError(f"readme: {path} has no questions with choices; run it with --tasks")
    asked = sorted({n for method, n in means if method != "base"})
    cells = [
        [f"layers to skip (base model: {means['base', 0.0]:.1f} %)", *(f"{n:g}" for n in asked)]
    ]
    for method in dict.fromkeys(method for method, _ in means if method != "base"):
        texts = [f"{means[method, n]:.1f}" if (method, n) in means else "-" for n in asked]
        cells.append([_VARIANTS.get(method, method), *texts])
    return markdown_table(cells)


def _evaluation(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"readme: {path} is no evaluation: {error!r}") from error
    return rows
