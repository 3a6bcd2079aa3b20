"""Measured rows of one setting beside their predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import CheckpointError

from ..ideal import flops_of_prompt
from .model import Machine, dense_seconds, step_seconds
from .points import Point, Series
from .precision import Precision
from .union import independent_layers


@dataclass(frozen=True)
class Row:
    """One measured row. skipped: layers of a token; of prompts, the share of the routed layers; None = dense."""

    name: str
    skipped: float | None
    seconds: float
    spread: float | None = None


@dataclass(frozen=True)
class Setting:
    """Where rows come from: the folder, the model, its type, and what else was set (threads, batch, context)."""

    machine: str
    model: str
    dtype: str
    words: str


def decode_series(
    setting: Setting,
    rows: Sequence[Row],
    machine: Machine,
    config: FlexiDepthConfig,
    precision: Precision,
    *,
    batch: int = 1,
    context: int = 0,
) -> Series:
    """machine: as it was assumed beforehand, with the bandwidth measured in that run. The batch's sequences each
    skip so many layers at random places."""
    dense = _dense(rows)
    fitted = machine.fitted(config, precision, dense.seconds, rows=batch, context=context)
    points = []
    for row in rows:
        if row.skipped is None:
            fixed = dense_seconds(machine, config, precision, rows=batch, context=context)
            again = None
        else:
            rates = [row.skipped / config.num_routed_layers] * config.num_routed_layers
            layers = independent_layers(rates, batch)
            fixed, again = (
                step_seconds(known, config, precision, layers, context=context)
                for known in (machine, fitted)
            )
        points.append(_point(row, fixed, again))
    return Series(
        setting.machine,
        setting.model,
        setting.dtype,
        setting.words,
        "decode",
        fitted.share,
        None,
        points,
    )


def prompt_series(
    setting: Setting, rows: Sequence[Row], config: FlexiDepthConfig, tokens: int
) -> Series:
    """Prompts of `tokens` tokens, at the arithmetic rate of the dense row."""
    dense = _dense(rows)
    rate = flops_of_prompt(config, tokens, 0.0, routers=False) / dense.seconds
    points = [
        _point(
            row,
            None,
            None if row.skipped is None else flops_of_prompt(config, tokens, row.skipped) / rate,
        )
        for row in rows
    ]
    return Series(
        setting.machine,
        setting.model,
        setting.dtype,
        setting.words,
        "prompt",
        None,
        rate / 1e9,
        points,
    )


def _dense(rows: Sequence[Row]) -> Row:
    dense = next((row for row in rows if row.skipped is None), None)
    if dense is None:
        raise CheckpointError("it has no dense row; wanted one that the others are compared with")
    return dense


def _point(row: Row, fixed: float | None, fitted: float | None) -> Point:
    ms = [None if seconds is None else seconds * 1e3 for seconds in (fixed, fitted)]
    return Point(row.name, row.skipped, row.seconds * 1e3, ms[0], ms[1], row.spread)
