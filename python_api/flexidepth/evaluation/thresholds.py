"""Points of a model with routers: for each subject the thresholds under which it skips what was asked of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import FlexiDepthConfig
from ..dial import calibrated_thresholds
from ..errors import ValueOutOfRangeError
from .data import ANSWERS, EvalData
from .points import DIAL, Point, Subject

if TYPE_CHECKING:
    from ..llm import FlexiDepth
    from ..training.calibration import CalibrationPoint


def routed_points(
    method: str,
    llm: FlexiDepth,
    data: EvalData,
    wanted: Mapping[float, Sequence[Subject]],
    notify: Callable[[str], None],
) -> list[Point]:
    """The model's own routing, its thresholds moved together until each subject skips so many layers of its own
    calibration text.

    What is found for a subject and a number depends on no other one: another run, or one that was interrupted, finds
    the same.

    Args:
        wanted: {layers to skip: subjects}. notify: told of subjects of which no thresholds skip so many.
    """
    from ..training.calibration import calibrate_each

    routed = llm.config.num_routed_layers
    found: dict[float, dict[Subject, CalibrationPoint]] = {n: {} for n in wanted}
    for subject, text in data.calibration.items():
        numbers = [n for n, own in wanted.items() if 0 < n < routed and subject in own]
        if not numbers:
            continue
        name = "all texts" if subject == ANSWERS else subject[1]
        notify(f"{method}: thresholds on {text.tokens} tokens of {name}")
        results = calibrate_each(llm, text.sequences, numbers, counted=text.counted)
        for number, result in results.items():
            if isinstance(result, ValueOutOfRangeError):
                notify(f"{method}, {name}: {result}; that row is left out")
            else:
                found[number][subject] = result
    return [
        _end_point(method, number, llm.config)
        if number in (0, routed)
        else _found_point(method, number, found[number])
        for number in wanted
    ]


def dial_points(
    config: FlexiDepthConfig, skipped: Sequence[float], notify: Callable[[str], None]
) -> list[Point]:
    """The model as users ask it to skip so many layers: by the calibration that is stored in it, whatever the text.

    notify: told of a model without one, and of numbers that it does not reach.
    """
    if not config.calibration:
        notify(f"{DIAL}: the model has no calibration; left out (`flexidepth calibrate` makes one)")
        return []
    points = []
    for number in skipped:
        try:
            thresholds = calibrated_thresholds(config.calibration, number)
        except ValueOutOfRangeError as error:
            notify(f"{DIAL}: {error}; the point is left out")
            continue
        points.append(Point(DIAL, number, None, thresholds, details={"thresholds": thresholds}))
    return points


def _end_point(method: str, number: float, config: FlexiDepthConfig) -> Point:
    """No layer skipped, or all of them: nothing to search."""
    thresholds = [float(number > 0)] * config.num_routed_layers
    # With the gate "multiplier" a layer that runs is not the base model's.
    plain = number == 0 and config.gate == "straight_through"
    details: dict[str, Any] = {"thresholds": thresholds}
    return Point(method, number, None, thresholds, details=details, same_as_base=plain)


def _found_point(method: str, number: float, found: Mapping[Subject, CalibrationPoint]) -> Point:
    each = [
        {
            "part": part,
            "subject": name,
            "offset": point.offset,
            "calibration_skipped": point.layers_skipped,
            "thresholds": point.thresholds,
        }
        for (part, name), point in found.items()
    ]
    own = {subject: Point(method, number, None, p.thresholds) for subject, p in found.items()}
    return Point(method, number, each=own, details={"each": each})
