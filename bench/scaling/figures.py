"""The study's figures; they take the values of `make_study`, as its JSON has them."""

from __future__ import annotations

from typing import Any

from flexidepth.plots import new_figure

_COLORS = {"bf16": "#1b9e77", "int8": "#d95f02", "int4": "#7570b3"}
_ROUTINGS = {
    "alike": ("o--", "independent, all layers alike"),
    "by layer": ("s:", "independent, layers as recorded"),
    "recorded": ("D-", "recorded"),
}


def speedup_figure(study: dict[str, Any]) -> Any:
    """Speed-up over dense against layers skipped: a row for each model, a column for each device, a line for each
    precision; dashed: the LM head stays bf16."""
    models = [one["model"] for one in study["models"]]
    layers = [one["routed"] for one in study["models"]]
    devices = [one["name"] for one in study["devices"]]
    figure, axes = new_figure(
        3 * len(devices), 2.6 * len(models), len(models), columns=len(devices), share_y="row"
    )
    for axis_row, model, routed in zip(axes, models, layers, strict=True):
        for axis, device in zip(axis_row, devices, strict=True):
            rows = [r for r in study["decode"] if (r["model"], r["device"]) == (model, device)]
            _draw_speedups(axis, rows)
            axis.set_title(f"{model}, {device}", fontsize=9)
            axis.set_xlim(0, routed)
        axis_row[0].set_ylabel("times dense")
    for axis in axes[-1]:
        axis.set_xlabel("layers skipped per token")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _draw_speedups(axis: Any, rows: list[dict[str, Any]]) -> None:
    axis.axhline(1, color="black", linewidth=0.8)
    missing = []
    for row in rows:
        if not row["fits"]:
            missing.append(f"{row['precision']}: {row['resident_gb']:.0f} GB")
            continue
        kind, _, head = row["precision"].partition(",")
        axis.plot(
            range(len(row["speedup"])),
            row["speedup"],
            "--" if head else "-",
            color=_COLORS[kind],
            label=row["precision"],
        )
    if missing:
        text = "does not fit:\n" + "\n".join(missing)
        axis.annotate(text, (0.04, 0.96), xycoords="axes fraction", fontsize=7, va="top")


def union_figure(study: dict[str, Any]) -> Any:
    """Share of the routed layers that a batch reads, and the ideal speed-up of two models, against the batch: a
    column for each setting of the dial."""
    levels = list(study["recording"]["levels"])
    models = list(study["batches"][0]["ideal"])
    figure, axes = new_figure(
        3.6 * len(levels),
        2.7 * (1 + len(models)),
        1 + len(models),
        columns=len(levels),
        share_y="row",
    )
    for column, level in enumerate(levels):
        own = [row for row in study["batches"] if row["level"] == level]
        recorded = study["recording"]["levels"][level]
        routed = len(recorded["skip_rates"])
        axes[0][column].set_title(
            f"{level}: {recorded['skipped']:.1f} of {routed} skipped", fontsize=9
        )
        sizes = sorted({row["rows"] for row in own})
        for routing, (style, label) in _ROUTINGS.items():
            rows = [row for row in own if row["routing"] == routing]
            axes[0][column].plot(
                sizes, [row["running"] / routed for row in rows], style, label=label
            )
            for axis, model in zip(axes[1:, column], models, strict=True):
                axis.plot(sizes, [row["ideal"][model] for row in rows], style, label=label)
        for axis in axes[1:, column]:
            axis.axhline(1, color="black", linewidth=0.8)
        for axis in axes[:, column]:
            axis.set_xticks(sizes)
        axes[-1][column].set_xlabel("sequences in the batch")
    axes[0][0].set_ylabel("routed layers read")
    for axis, model in zip(axes[1:, 0], models, strict=True):
        axis.set_ylabel(f"ideal, {model}")
    axes[0][0].legend(fontsize=7)
    return figure


def error_figure(study: dict[str, Any]) -> Any:
    """Predicted against measured speed-up of every point: decoding from constants stated beforehand, and prompts."""
    figure, axes = new_figure(10, 5, columns=2)
    for axis, kind in zip(axes, ("decode", "prompt"), strict=True):
        values = [1.0]
        own = [one for one in study["measured"]["series"] if one["kind"] == kind]
        for number, one in enumerate(own):
            pairs = _speedups(one)
            values += [value for pair in pairs for value in pair]
            label = f"{one['machine']}, {one['setting']}"
            marker = "os^vD*P"[number % 7]
            axis.plot([m for m, _ in pairs], [p for _, p in pairs], marker, label=label, alpha=0.7)
        ends = [0.97 * min(values), 1.03 * max(values)]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set_xlabel(f"measured speed-up over dense, {kind}")
        axis.set_ylabel("predicted")
        if own:
            axis.legend(fontsize=7)
    return figure


def _speedups(series: dict[str, Any]) -> list[tuple[float, float]]:
    """(measured, predicted) of the points that skip."""
    (dense,) = (point for point in series["points"] if point["skipped"] is None)
    pairs = []
    for point in series["points"]:
        if point is not dense:
            predicted = (
                dense["measured"] / point["fitted"]
                if dense["fixed"] is None
                else dense["fixed"] / point["fixed"]
            )
            pairs.append((dense["measured"] / point["measured"], predicted))
    return pairs
