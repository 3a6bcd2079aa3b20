"""The dial: how many layers a token skips on average, as thresholds that a calibration measured.

A calibration is a list of points {"layers_skipped": n, "thresholds": [tau of each routed layer]}, ascending in
n, the mean number of layers that a token skips under these thresholds. `flexidepth.training.calibration`
makes it; it lies in the model's configuration. Its points differ by an offset of the gates' logits, so between
two of them each tau is interpolated along its logit.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from .errors import UnsupportedError, ValueOutOfRangeError

PRESETS = {"quality": 2.0, "balanced": 4.0, "fast": 6.0}  # mean layers skipped a token
TOLERANCE = 0.02  # layers: how near a calibration comes to what was wanted
# Of a logit that is taken. Gates are float32: near 0 they go far, near 1 they end.
SMALLEST_TAU, LARGEST_TAU = 1e-30, 1 - 1e-6
_MAKES_IT = "`flexidepth calibrate MODEL --data FILE` makes one"


def check_thresholds(
    thresholds: Sequence[float], num_routed: int, layers: Sequence[int] | None = None
) -> None:
    """Raise ValueOutOfRangeError unless there is one threshold in [0, 1] for each routed layer.

    layers: numbers of the routed layers, to be named in the error.
    """
    if len(thresholds) != num_routed:
        raise ValueOutOfRangeError(
            f"thresholds: {len(thresholds)} values; this model routes {num_routed} layers, "
            f"give one value or {num_routed}"
        )
    for i, tau in enumerate(thresholds):
        if not (_is_number(tau) and 0.0 <= tau <= 1.0):
            where = "" if layers is None else f" (layer {layers[i]})"
            raise ValueOutOfRangeError(
                f"thresholds: value {i}{where} is {tau!r}; a threshold lies in [0, 1]"
            )


def check_dial(calibration: Any, presets: Any, layers: Sequence[int]) -> None:
    """Raise ValueOutOfRangeError unless these are points of a calibration, and presets within its range.

    Args:
        calibration: what the configuration's `calibration` says, [] for none.
        presets: what its `skip_presets` says, {name: mean layers skipped a token}.
        layers: numbers of the routed layers.
    """
    if not isinstance(calibration, list):
        raise ValueOutOfRangeError(
            f"config: calibration is {calibration!r}; wanted a list of points; {_MAKES_IT}"
        )
    for number, point in enumerate(calibration):
        _check_point(number, point, layers)
    counts = [point["layers_skipped"] for point in calibration]
    if any(low >= high for low, high in pairwise(counts)):
        raise ValueOutOfRangeError(
            f"config: calibration's layers_skipped are {counts}; wanted them ascending"
        )
    if not isinstance(presets, dict):
        raise ValueOutOfRangeError(
            f"config: skip_presets is {presets!r}; wanted {{name: mean number of layers skipped}}"
        )
    for name, target in presets.items():
        if not (isinstance(name, str) and _is_number(target) and _reached(calibration, target)):
            raise ValueOutOfRangeError(
                f"config: skip_presets' {name!r} is {target!r}; wanted a name and a number of layers that the "
                f"calibration reaches: {describe_range(calibration)}"
            )


def _check_point(number: int, point: Any, layers: Sequence[int]) -> None:
    if not isinstance(point, Mapping) or set(point) != {"layers_skipped", "thresholds"}:
        raise ValueOutOfRangeError(
            f"config: calibration's point {number} is {point!r}; wanted "
            "{'layers_skipped': number, 'thresholds': [numbers]}"
        )
    count, thresholds = point["layers_skipped"], point["thresholds"]
    if not (_is_number(count) and 0 <= count <= len(layers)):
        raise ValueOutOfRangeError(
            f"config: calibration's point {number} skips {count!r} layers; wanted 0 to {len(layers)}, the routed ones"
        )
    if not isinstance(thresholds, list):
        raise ValueOutOfRangeError(
            f"config: calibration's point {number} has thresholds {thresholds!r}; wanted a list of numbers"
        )
    check_thresholds(thresholds, len(layers), layers)


def reached_presets(
    calibration: Sequence[Mapping[str, Any]], presets: Mapping[str, float] = PRESETS
) -> dict[str, float]:
    """Those of `presets` that lie within the calibrated range."""
    return {name: target for name, target in presets.items() if _reached(calibration, target)}


def describe_range(calibration: Sequence[Mapping[str, Any]]) -> str:
    """The calibrated range in words."""
    if not calibration:
        return "there is no calibration"
    first, last = (calibration[i]["layers_skipped"] for i in (0, -1))
    return f"{first:.2f} to {last:.2f} layers"


def preset_target(
    calibration: Sequence[Mapping[str, Any]], presets: Mapping[str, float], name: Any
) -> float:
    """Mean layers skipped a token that a preset stands for.

    Raises:
        UnsupportedError: no calibration. ValueOutOfRangeError: a name that there is not.
    """
    _need(calibration, f"skip {name!r}")
    if not isinstance(name, str) or name not in presets:
        known = ", ".join(sorted(presets, key=lambda preset: presets[preset])) or "none"
        close = difflib.get_close_matches(str(name), presets, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueOutOfRangeError(
            f"skip: no preset {name!r}; this model has: {known}{hint} (target_layers_skipped takes any number "
            f"from {describe_range(calibration)})"
        )
    return presets[name]


def calibrated_thresholds(calibration: Sequence[Mapping[str, Any]], target: float) -> list[float]:
    """tau of each routed layer under which a token skips `target` layers on average.

    Between two points logit tau is linear in the number of layers skipped; tau is kept 1e-30 away from 0
    and 1e-6 from 1 for that. A target outside the range by no more than the calibration's tolerance takes the
    nearest point.

    Raises:
        UnsupportedError: no calibration. ValueOutOfRangeError: a target outside the calibrated range.
    """
    _need(calibration, f"target_layers_skipped {target!r}")
    if not (_is_number(target) and _reached(calibration, target)):
        raise ValueOutOfRangeError(
            f"target_layers_skipped: {target!r}; this model is calibrated for {describe_range(calibration)} a token"
        )
    for point in calibration:
        if point["layers_skipped"] == target:
            return [float(tau) for tau in point["thresholds"]]
    for low, high in pairwise(calibration):
        a, b = low["layers_skipped"], high["layers_skipped"]
        if a < target < b:
            part = (target - a) / (b - a)
            pairs = zip(low["thresholds"], high["thresholds"], strict=True)
            return [sigmoid((1 - part) * logit(x) + part * logit(y)) for x, y in pairs]
    end = calibration[0] if target < calibration[0]["layers_skipped"] else calibration[-1]
    return [float(tau) for tau in end["thresholds"]]


def logit(tau: float) -> float:
    """log(tau / (1 - tau)), of a tau kept within [1e-30, 1 - 1e-6]."""
    kept = min(max(tau, SMALLEST_TAU), LARGEST_TAU)
    return math.log(kept) - math.log1p(-kept)


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), for values of any size."""
    if value < 0:
        return math.exp(value) / (1 + math.exp(value))
    return 1 / (1 + math.exp(-value))


def _need(calibration: Iterable[Any], asked: str) -> None:
    if not calibration:
        raise UnsupportedError(
            f"{asked}: this model is not calibrated, so which thresholds that takes is not known; {_MAKES_IT}, or "
            "give skip_threshold"
        )


def _reached(calibration: Sequence[Mapping[str, Any]], target: float) -> bool:
    if not calibration:
        return False
    first, last = (calibration[i]["layers_skipped"] for i in (0, -1))
    return bool(first - TOLERANCE <= target <= last + TOLERANCE)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
