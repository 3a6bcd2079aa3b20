"""The curves of a training run: losses, layers used, and what each layer skips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ValueOutOfRangeError
from ..plots import new_figure, save_figure

_LOSSES = ("lm_loss", "base_lm_loss", "kl", "skip_loss", "adapter_distance")


def training_figure(log: Sequence[dict[str, Any]]) -> Any:
    """Losses, mean layers used, and a heat map of skip rates by layer, against optimiser steps.

    log: `log_history` of the Trainer, the "history" of log.json in a stage's folder.

    Raises:
        ValueOutOfRangeError: a log without training figures.
    """
    rows = [row for row in log if "loss" in row and "step" in row]
    if not rows:
        raise ValueOutOfRangeError("plot: the training log holds no figures yet")
    routed = "layers_used" in rows[0]
    figure, axes = new_figure(8, 9 if routed else 4, 3 if routed else 1)
    steps = [row["step"] for row in rows]
    losses = axes[0] if routed else axes
    for name in _LOSSES:
        if name in rows[0]:
            values = [float(row[name]) for row in rows]
            losses.plot(steps, values, label=name.replace("_", " "))
    losses.set_yscale("log")
    losses.set_ylabel("loss")
    losses.legend(fontsize=8)
    losses.set_xlabel("optimiser steps")
    if routed:
        _draw_layers(axes[1], steps, rows)
        _draw_skip_rates(figure, axes[2], steps, rows)
    return figure


def _draw_layers(axis: Any, steps: list[int], rows: Sequence[dict[str, Any]]) -> None:
    axis.plot(steps, [float(row["layers_used"]) for row in rows])
    axis.set_ylabel("mean layers used")
    axis.set_xlabel("optimiser steps")


def _draw_skip_rates(
    figure: Any, axis: Any, steps: list[int], rows: Sequence[dict[str, Any]]
) -> None:
    names = [name for name in rows[0] if name.startswith("skip_rate/")]
    rates = [[float(row[name]) for row in rows] for name in names]
    image = axis.imshow(
        rates, aspect="auto", cmap="Oranges", vmin=0, vmax=1, interpolation="nearest"
    )
    figure.colorbar(image, ax=axis, label="skip rate")
    axis.set_yticks(range(len(names)), [n.removeprefix("skip_rate/") for n in names], fontsize=7)
    marks = range(0, len(steps), max(1, len(steps) // 8))
    axis.set_xticks(list(marks), [str(steps[i]) for i in marks])
    axis.set_ylabel("routed layer")
    axis.set_xlabel("optimiser steps")


def write_training_figure(log: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw `training_figure` into a PNG or SVG file."""
    return save_figure(training_figure(log), path)
