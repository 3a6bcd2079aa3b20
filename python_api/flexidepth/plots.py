"""Pictures: which layers a text used, and speed against layers skipped. Needs matplotlib (flexidepth[plot])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import FlexiDepthError, ValueOutOfRangeError
from .routing import RoutingReport

_FORMATS = (".png", ".svg")
_MAX_TOKENS = 120


def _figure(
    width: float, height: float, rows: int = 1, ratios: list[float] | None = None
) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError:
        raise FlexiDepthError(
            "plot: matplotlib is not installed; pip install 'flexidepth[plot]'"
        ) from None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, 1, gridspec_kw={"height_ratios": ratios} if ratios else None)
    return figure, axes


def routing_figure(report: RoutingReport, max_tokens: int = _MAX_TOKENS) -> Any:
    """Token x layer heat map, layers used per token below it, skip rate per layer in the row labels.

    Shows the last `max_tokens` tokens; the rest of the prompt is left out.
    """
    start = max(0, len(report.tokens) - max_tokens)
    tokens, used = report.tokens[start:], report.layers_used[start:]
    if not tokens:
        raise ValueOutOfRangeError("plot: the routing report holds no tokens")
    skip_rate = report.skip_rate
    figure, (top, bottom) = _figure(
        max(6.0, 0.16 * len(tokens) + 2.5), 0.24 * len(skip_rate) + 4, 2, [3, 1]
    )
    top.imshow(
        report.ran[start:].T.numpy(),
        aspect="auto",
        cmap="Oranges",
        vmin=0,
        vmax=1.4,
        interpolation="nearest",
    )
    top.set_yticks(
        range(len(skip_rate)),
        [f"{layer}  ({rate:.0%} skip)" for layer, rate in skip_rate.items()],
        fontsize=7,
    )
    top.set_xticks([])
    top.set_ylabel("routed layer")
    top.set_title(
        f"layers run (dark) by token, mean {report.mean_layers_used:.1f} of {report.num_layers}"
    )
    border = report.prompt_length - start
    for axis in (top, bottom):
        if 0 < border < len(tokens):
            axis.axvline(border - 0.5, color="black", linewidth=1)
    bottom.bar(range(len(tokens)), used, color="#d95f02", width=0.9)
    bottom.set_xlim(-0.5, len(tokens) - 0.5)
    bottom.set_ylim(max(0, min(used) - 1), report.num_layers)
    bottom.set_ylabel("layers used")
    labels = [t.replace("\n", "\\n").replace("$", r"\$") for t in tokens]
    bottom.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=7)
    return figure


def speed_figure(result: dict[str, Any]) -> Any:
    """Tokens per second against layers skipped, with the ideal line and the peers' dense lines.

    result: the JSON of `flexidepth bench`.
    """
    figure, axis = _figure(7, 4.5)
    for threads in sorted({row["threads"] for row in result["decode"]}):
        rows = [row for row in result["decode"] if row["threads"] == threads]
        dense = next(row for row in rows if row["name"] == "dense")
        base = 1e3 / dense["ms_median"]
        ours = sorted(
            (row for row in rows if row["skipped"] is not None), key=lambda row: row["skipped"]
        )
        skipped = [row["skipped"] for row in ours]
        (line,) = axis.plot(
            skipped, [1e3 / row["ms_median"] for row in ours], "o-", label=f"{threads} threads"
        )
        axis.plot(
            skipped,
            [base * row["ideal"] for row in ours],
            "--",
            color=line.get_color(),
            label="ideal",
        )
        for row in rows:
            if row["skipped"] is None and row["name"] != "dense":
                axis.axhline(
                    1e3 / row["ms_median"], color=line.get_color(), linewidth=0.8, alpha=0.6
                )
                axis.annotate(
                    f"{row['name']}, {threads} threads",
                    (0, 1e3 / row["ms_median"]),
                    fontsize=7,
                    va="bottom",
                )
    axis.set_xlabel(f"layers skipped per token (of {result['num_layers']})")
    axis.set_ylabel("tokens per second")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    axis.set_title(
        f"decode, {result['model']}, {result['dtype']}, {result['machine']['cpu']}", fontsize=9
    )
    return figure


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, by the file's ending."""
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise ValueOutOfRangeError(
            f"plot: {target.name!r}: wanted a name that ends in {' or '.join(_FORMATS)}"
        )
    figure.savefig(target, dpi=150)
    return target
