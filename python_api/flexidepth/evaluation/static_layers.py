"""The same layers skipped for every token, with the trained adapters: what routing by token has to beat."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..training.calibration_text import TokenSequence
from .data import ANSWERS, EvalData
from .points import STATIC_ADAPTERS, Point, Subject
from .windows import trace_windows

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine

    from ..llm import FlexiDepth


def greedy_order(
    loss: Callable[[Sequence[int]], float], layers: Sequence[int], most: int
) -> list[int]:
    """Layers in the order in which skipping them costs least, each beside those before it.

    A layer's price rises with the layers that are gone already, so those that were dearer before than the cheapest is
    now are not looked at again (lazy greedy, Minoux 1978); where a price falls instead, the choice may miss that.

    Args:
        loss: of skipping these layers. most: layers that are wanted.
    """
    chosen: list[int] = []
    current = loss(chosen)
    # (price, layer, how many were skipped when it was looked at)
    prices = [(loss([layer]) - current, layer, 0) for layer in layers] if most else []
    heapq.heapify(prices)
    while len(chosen) < most:
        price, layer, seen = heapq.heappop(prices)
        if seen < len(chosen):
            now = loss([*chosen, layer]) - current
            heapq.heappush(prices, (now, layer, len(chosen)))
        else:
            chosen.append(layer)
            current += price
    return chosen


def skipping_order(engine: Engine, windows: Sequence[TokenSequence], most: int) -> list[int]:
    """`most` routed layers in the order in which the windows miss them least, adapters in their place.

    Args:
        windows: token ids and which of them count.
    """
    routed = list(engine.config.routing_layers)

    def loss(skipped: Sequence[int]) -> float:
        kept = [layer for layer in routed if layer not in skipped]
        trace = trace_windows(engine, windows, Point(STATIC_ADAPTERS, len(skipped), kept))
        return -float(trace.logprobs.double().mean())

    return greedy_order(loss, routed, most)


def static_points(
    llm: FlexiDepth,
    data: EvalData,
    wanted: Mapping[float, Sequence[Subject]],
    notify: Callable[[str], None],
) -> list[Point]:
    """For each subject the layers without which its own calibration text does best.

    What is chosen for a subject depends on no other one.

    Args:
        wanted: {layers to skip, whole numbers: subjects}.
    """
    routed = list(llm.config.routing_layers)
    orders: dict[Subject, list[int]] = {}
    for subject, text in data.calibration.items():
        most = max((number for number, own in wanted.items() if subject in own), default=0)
        if most:
            name = "all texts" if subject == ANSWERS else subject[1]
            notify(f"{STATIC_ADAPTERS}: layers to skip, on {text.tokens} tokens of {name}")
            orders[subject] = skipping_order(llm.engine, text.windows, round(most))
    points = []
    for number, subjects in wanted.items():
        if number == 0:
            points.append(Point(STATIC_ADAPTERS, 0, routed, same_as_base=True))
            continue
        skipped = {subject: sorted(orders[subject][: round(number)]) for subject in subjects}
        own = {
            subject: Point(STATIC_ADAPTERS, number, [n for n in routed if n not in dropped])
            for subject, dropped in skipped.items()
        }
        details = [
            {"part": part, "subject": name, "skipped": dropped}
            for (part, name), dropped in skipped.items()
        ]
        points.append(Point(STATIC_ADAPTERS, number, each=own, details={"each": details}))
    return points
