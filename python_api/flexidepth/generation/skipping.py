"""The thresholds of a call, said in one of three ways: as they are, by a preset's name, by layers skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..arguments import as_number
from ..config import FlexiDepthConfig
from ..dial import calibrated_thresholds, check_thresholds, preset_target
from ..errors import ValueOutOfRangeError

ARGUMENTS = ("skip_threshold", "skip", "target_layers_skipped")


def resolve_thresholds(
    config: FlexiDepthConfig,
    skip_threshold: Any = None,
    skip: Any = None,
    target_layers_skipped: Any = None,
) -> list[float] | None:
    """tau of each routed layer; None where nothing is given and the configuration's hold.

    Args:
        skip_threshold: tau, one for all routed layers or one each; in [0, 1].
        skip: name of a preset of the model ("quality", "balanced", "fast"; config.skip_presets).
        target_layers_skipped: layers that a token skips on average, within the calibrated range.

    Raises:
        ValueOutOfRangeError: more than one of them, a value out of range, an unknown name.
        UnsupportedError: a preset or a number of layers for a model without a calibration.
    """
    values = dict(zip(ARGUMENTS, (skip_threshold, skip, target_layers_skipped), strict=True))
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) > 1:
        said = " and ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueOutOfRangeError(f"thresholds: {said}; give one of them")
    if skip is not None:
        target = preset_target(config.calibration, config.skip_presets, skip)
        return calibrated_thresholds(config.calibration, target)
    if target_layers_skipped is not None:
        number = as_number(target_layers_skipped)
        return calibrated_thresholds(
            config.calibration, target_layers_skipped if number is None else number
        )
    return None if skip_threshold is None else _as_given(skip_threshold, config.num_routed_layers)


def with_defaults(defaults: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` on top of `defaults`, where one way to say the thresholds replaces whichever was the default."""
    if any(arguments.get(name) is not None for name in ARGUMENTS):
        defaults = {name: value for name, value in defaults.items() if name not in ARGUMENTS}
    return {**defaults, **arguments}


def _as_given(value: Any, num_routed: int) -> list[float]:
    one = as_number(value)
    several = not isinstance(value, (str, bytes)) and isinstance(value, Iterable)
    if one is None and not several:
        raise ValueOutOfRangeError(
            f"skip_threshold: {value!r}; wanted a number in [0, 1] or {num_routed} of them, one for each routed layer"
        )
    # What is no number goes on as it is, for the check to name it.
    values = (
        [one] * num_routed
        if one is not None
        else [v if (n := as_number(v)) is None else n for v in value]
    )
    check_thresholds(values, num_routed)
    return values
