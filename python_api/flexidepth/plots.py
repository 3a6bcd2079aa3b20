"""Which layers a text used and quality against layers skipped, as matplotlib figures; of speed: `bench.figures`.

Needs matplotlib (pip install flexidepth[plot]), no display.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError, FlexiDepthError, ValueOutOfRangeError
from .routing import RoutingReport

_FORMATS = (".png", ".svg")
_MAX_TOKENS = 120
_MAX_INCHES = 200.0  # an image holds at most 2^16 points a side
_DPI = 150
_DARK = "#d95f02"
_WORST_RATIO = 5.0  # what is worse than five times the base model leaves the picture


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    ratios: list[float] | None = None,
    columns: int = 1,
    share_y: Literal["none", "row"] = "none",
) -> tuple[Any, Any]:
    """A matplotlib figure of so many inches, and its axes; FlexiDepthError where matplotlib is missing."""
    try:
        # A Figure of its own, without pyplot, needs no display and leaves the caller's alone.
        from matplotlib.figure import Figure
    except ImportError:
        raise FlexiDepthError(
            "plot: matplotlib is not installed; pip install flexidepth[plot]"
        ) from None
    figure = Figure(figsize=(min(width, _MAX_INCHES), height), layout="constrained")
    grid: dict[str, Any] = {"height_ratios": ratios} if ratios else {}
    return figure, figure.subplots(rows, columns, sharey=share_y, gridspec_kw=grid)


def routing_figure(report: RoutingReport, max_tokens: int = _MAX_TOKENS) -> Any:
    """Token x layer heat map, layers used per token below it, skip rate per layer in the row labels.

    Shows the last `max_tokens` tokens; a black line stands between prompt and answer. Skip rates are
    those of the whole report.

    Raises:
        ValueOutOfRangeError: a report without tokens, max_tokens below 1.
        CheckpointError: a report whose parts do not fit together.
    """
    if max_tokens < 1:
        raise ValueOutOfRangeError(f"plot: max_tokens is {max_tokens}; wanted 1 or more")
    start = max(0, len(report.tokens) - max_tokens)
    tokens = report.tokens[start:]
    if not tokens or not report.routing_layers:
        raise ValueOutOfRangeError(
            f"plot: the routing report holds {len(tokens)} tokens and {len(report.routing_layers)} "
            "routed layers; wanted one or more of each"
        )
    if len(report.tokens) != len(report.ran):
        raise CheckpointError(
            f"plot: the routing report has {len(report.tokens)} tokens and {len(report.ran)} rows of "
            "decisions; wanted as many"
        )
    skip_rate = report.skip_rate
    width, height = max(6.0, 0.16 * len(tokens) + 2.5), 0.24 * len(skip_rate) + 4
    figure, (top, bottom) = new_figure(width, height, 2, [3, 1])
    _draw_decisions(top, report, start, skip_rate)
    _draw_layers_used(bottom, report, start)
    border = report.prompt_length - start
    for axis in (top, bottom):
        if 0 < border < len(tokens):
            axis.axvline(border - 0.5, color="black", linewidth=1)
    return figure


def _draw_decisions(
    axis: Any, report: RoutingReport, start: int, skip_rate: dict[int, float]
) -> None:
    decisions = report.ran[start:].T.numpy()
    axis.imshow(decisions, aspect="auto", cmap="Oranges", vmin=0, vmax=1.4, interpolation="nearest")
    labels = [f"{layer}  ({rate:.0%} skip)" for layer, rate in skip_rate.items()]
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_xticks([])
    axis.set_ylabel("routed layer")
    axis.set_title(
        f"layers run (dark) by token, mean {report.mean_layers_used:.1f} of {report.num_layers}"
    )


def _draw_layers_used(axis: Any, report: RoutingReport, start: int) -> None:
    used, tokens = report.layers_used[start:], report.tokens[start:]
    axis.step(range(len(used)), used, where="mid", color=_DARK)
    axis.fill_between(range(len(used)), used, step="mid", color=_DARK, alpha=0.25)
    axis.set_xlim(-0.5, len(used) - 0.5)
    axis.set_ylim(max(0, min(used) - 1), report.num_layers + 0.5)
    axis.set_ylabel("layers used")
    axis.set_xticks(range(len(tokens)), [_label(t) for t in tokens], rotation=90, fontsize=7)


def _label(token: str) -> str:
    """A token's text on one line, free of control characters and of matplotlib's maths sign."""
    visible = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in token[:24]
    )
    return plain_text(visible)


def plain_text(text: str) -> str:
    """Text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def quality_figure(result: dict[str, Any]) -> Any:
    """Perplexity over the base model's, on a log scale up to 5 times, against mean layers skipped and against the
    weights that decoding a token reads: a row of panels for each set of texts, a line for each method.

    result: the JSON of `flexidepth eval`. CheckpointError where it is not one with rows of texts.
    """
    try:
        rows = [row for row in result["rows"] if row["part"] == "text"]
        sets = list(dict.fromkeys(row["subject"] for row in rows if row["method"] != "base"))
        if not sets:
            raise CheckpointError("plot: the evaluation has no texts; run it with --prose")
        figure, axes = new_figure(12, 3.6 * len(sets), len(sets), columns=2, share_y="row")
        for (layers, weights), name in zip(axes.reshape(-1, 2), sets, strict=True):
            own = [row for row in rows if row["subject"] == name]
            _draw_quality(layers, own, lambda row: row["skipped"])
            _draw_quality(weights, own, lambda row: row["bytes_per_token"] / 1e6)
            weights.invert_xaxis()
            layers.set_title(plain_text(name), fontsize=9)
            layers.set_xlabel(f"mean layers skipped per token (of {result['num_layers']})")
            weights.set_xlabel("MB of weights that a token reads")
            layers.set_ylabel("perplexity, times the base model's")
            layers.legend(fontsize=8)
    except (KeyError, TypeError) as error:
        raise _no_evaluation(error) from error
    return figure


def _draw_quality(
    axis: Any, rows: list[dict[str, Any]], place: Callable[[dict[str, Any]], float]
) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted(
            (r for r in rows if r["method"] == method and r["ratio"] is not None), key=place
        )
        if method == "base":
            axis.plot([place(r) for r in own], [r["ratio"] for r in own], "k*", label=method)
        else:
            axis.plot([place(r) for r in own], [r["ratio"] for r in own], "o-", label=method)
    axis.set_yscale("log")
    worst = max((r["ratio"] for r in rows if r["ratio"] is not None), default=1.0)
    axis.set_ylim(0.95, min(1.1 * worst, _WORST_RATIO))
    ticks = [1, 1.2, 1.5, 2, 3, 4, 5]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.grid(visible=True, which="both", linewidth=0.3)


def kinds_figure(result: dict[str, Any]) -> Any:
    """Kind of task x routed layer heat map of the share of answer tokens that ran the layer: a panel for each
    model.

    result: the JSON of `flexidepth eval`. CheckpointError where it is not one with rows of kinds.
    """
    try:
        rows = [row for row in result["rows"] if row["part"] == "kind" and row["run_rates"]]
        models = list(dict.fromkeys(row["method"] for row in rows))
        if not models:
            raise CheckpointError(
                "plot: the evaluation has no kinds of tasks; run it with --per-kind above 0"
            )
        height = 0.4 * len(rows) + 1.6 * len(models)
        figure, axes = new_figure(9, height, len(models))
        for axis, model in zip(axes if len(models) > 1 else [axes], models, strict=True):
            image = _draw_kinds(axis, [row for row in rows if row["method"] == model])
            axis.set_title(plain_text(f"{model}, {result['model']}"), fontsize=9)
        figure.colorbar(image, ax=axes, label="share of answer tokens that ran")
    except (KeyError, TypeError) as error:
        raise _no_evaluation(error) from error
    return figure


def _draw_kinds(axis: Any, rows: list[dict[str, Any]]) -> Any:
    rates = [row["run_rates"] for row in rows]
    image = axis.imshow(rates, aspect="auto", cmap="Oranges", vmin=0, vmax=1)
    labels = [f"{row['subject']}  ({row['answer_layers']:.1f} layers)" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=8)
    layers = rows[0]["routing_layers"]
    axis.set_xticks(range(len(layers)), layers, fontsize=8)
    axis.set_xlabel("routed layer")
    return image


def _no_evaluation(error: Exception) -> CheckpointError:
    return CheckpointError(f"plot: not an evaluation (write one with eval --output-dir): {error!r}")


def check_figure_path(path: str | Path) -> Path:
    """The path; ValueOutOfRangeError where its ending is not that of a format we write."""
    target = Path(path)
    if target.suffix.lower() not in _FORMATS:
        raise ValueOutOfRangeError(
            f"plot: {target.name!r}; wanted a name that ends in {' or '.join(_FORMATS)}"
        )
    return target


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, by the file's ending; the same figure gives the same file."""
    import matplotlib

    target = check_figure_path(path)
    metadata = {"Date": None} if target.suffix.lower() == ".svg" else None
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "flexidepth"}):
        # A script that the font lacks is drawn as boxes; the JSON has the text.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        figure.savefig(target, dpi=_DPI, metadata=metadata)
    return target
