"""What is measured: a way of routing that skips a number of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import FlexiDepthConfig
from ..routing import ForcedRouting, ForceRouting, resolve_force_routing, skip_ratio_mask

FLEXIDEPTH = "flexidepth"
DIAL = "dial"
STATIC_ADAPTERS = "static-adapters"
RANDOM_ADAPTERS = "random-adapters"
RANDOM = "random"
SHORTGPT = "shortgpt"
SHORTGPT_ROUTED = "shortgpt-routed"
BASE = "base"
METHODS = (
    FLEXIDEPTH,
    DIAL,
    STATIC_ADAPTERS,
    RANDOM_ADAPTERS,
    RANDOM,
    SHORTGPT,
    SHORTGPT_ROUTED,
)
Subject = tuple[str, str]  # part and name of what is measured, as in the keys of rows


@dataclass(frozen=True)
class Point:
    """One way of routing.

    method: of METHODS, "base", or the name of a further checkpoint. asked: layers a token is to skip in the
    mean. force, thresholds: as for `FlexiDepth.generate` (force_routing, skip_threshold). details: how it came
    about, for the record. same_as_base: whether it computes what the base model does. each: the point of each
    subject, where it has its own; None = the same for all. seed: of a share of layers in force.
    """

    method: str
    asked: float
    force: ForceRouting = None
    thresholds: list[float] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    same_as_base: bool = False
    each: Mapping[Subject, Point] | None = None
    seed: int = 0

    def at(self, subject: Subject) -> Point | None:
        """The point as it routes one subject; None where no thresholds skip so many layers of that."""
        return self if self.each is None else self.each.get(subject)

    def resolve(self, config: FlexiDepthConfig) -> tuple[ForcedRouting, Tensor | None]:
        """(routing, thresholds float32 [routed layers] or None) for the engine."""
        thresholds = None
        if self.thresholds is not None:
            thresholds = torch.tensor(self.thresholds, dtype=torch.float32)
        return resolve_force_routing(self.force, config, self.seed), thresholds

    def arguments(self) -> dict[str, Any]:
        """The same as arguments of `FlexiDepth.generate`."""
        return {
            "force_routing": self.force,
            "skip_threshold": self.thresholds,
            "routing_seed": self.seed,
        }


def base_point() -> Point:
    """The base model."""
    return Point(BASE, 0, force="dense", same_as_base=True)


def random_points(
    skipped: Sequence[float],
    routed: Sequence[int],
    ablated: FlexiDepthConfig,
    *,
    seed: int,
    positions: int,
) -> list[Point]:
    """Every token skips exactly so many of the `routed` layers, drawn by (seed, position), with nothing in their place.

    Args:
        routed: the layers among which is drawn. ablated: configuration of `without_adapters`, which routes
            every layer. positions: tokens that a sequence may have.
    """
    points = []
    for number in skipped:
        mask = torch.ones(positions, ablated.num_hidden_layers, dtype=torch.uint8)
        mask[:, list(routed)] = skip_ratio_mask(round(number), seed, 0, positions, len(routed))
        points.append(
            Point(RANDOM, number, mask, details={"seed": seed}, same_as_base=round(number) == 0)
        )
    return points


def random_adapter_points(skipped: Sequence[float], num_routed: int, *, seed: int) -> list[Point]:
    """The same draws, with the trained adapters in place of what is skipped; layers that run have weight 1."""
    return [
        Point(
            RANDOM_ADAPTERS,
            number,
            number / num_routed if num_routed else "all",
            details={"seed": seed},
            same_as_base=number == 0,
            seed=seed,
        )
        for number in skipped
    ]


def dropping_points(
    method: str, skipped: Sequence[float], influence: Sequence[float], among: Sequence[int]
) -> list[Point]:
    """The layers of lowest influence dropped for every token (ShortGPT, arXiv 2403.03853).

    Args:
        influence: of each layer of the model. among: layers that may be dropped.
    """
    order = sorted(among, key=lambda layer: influence[layer])
    points = []
    for number in skipped:
        dropped = sorted(order[: round(number)])
        kept = [layer for layer in range(len(influence)) if layer not in dropped]
        points.append(
            Point(method, number, kept, details={"dropped": dropped}, same_as_base=not dropped)
        )
    return points
