"""Sums over many batches, and the figures that are logged of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_SUMS = ("lm", "kl", "base_lm", "agreed", "penalty", "labels")


class RunningMetrics:
    """Adds what RoutingObjective returns, on whatever device, and gives means.

    Args:
        layers: numbers of the routed layers. num_layers: of all layers.
    """

    def __init__(self, layers: Sequence[int], num_layers: int) -> None:
        self.layers, self.num_layers = list(layers), num_layers
        self._totals: dict[str, Tensor] = {}

    def add(self, outputs: Mapping[str, Any]) -> None:
        """Take in a batch."""
        for name in (*_SUMS, "adapter", "skipped", "tokens"):
            if name in outputs:
                value = outputs[name].detach().double()
                value = value.sum(0) if name in ("skipped", "tokens") else value
                held = self._totals.get(name)
                self._totals[name] = value if held is None else held + value

    def __bool__(self) -> bool:
        return bool(self._totals)

    def means(self, gather: Any = None) -> dict[str, float]:
        """The figures of everything added, and a fresh start. gather: sums a tensor over all processes."""
        sums = {
            name: value if gather is None else gather(value) for name, value in self._totals.items()
        }
        self._totals = {}
        if not sums:
            return {}
        tokens = float(sums["tokens"])
        if "adapter" in sums:
            return {"adapter_distance": float(sums["adapter"].mean()) / tokens} | {
                f"adapter_distance/{layer}": float(value) / tokens
                for layer, value in zip(self.layers, sums["adapter"], strict=True)
            }
        labels = max(float(sums["labels"]), 1.0)
        found = {"lm_loss": float(sums["lm"]) / labels}
        if not math.isnan(float(sums["base_lm"])):
            found["base_lm_loss"] = float(sums["base_lm"]) / labels
            found["kl"] = float(sums["kl"]) / labels
            found["perplexity_ratio"] = math.exp(found["lm_loss"] - found["base_lm_loss"])
            found["agreement"] = float(sums["agreed"]) / labels
        found["skip_loss"] = float(sums["penalty"]) / tokens
        skipped = float(sums["skipped"].sum()) / tokens
        found |= {"layers_skipped": skipped, "layers_used": self.num_layers - skipped}
        return found | {
            f"skip_rate/{layer}": float(value) / tokens
            for layer, value in zip(self.layers, sums["skipped"], strict=True)
        }


def rounded(figures: Mapping[str, float], digits: int = 5) -> dict[str, float]:
    """Figures with so many significant digits, for logs."""
    return {name: float(f"{value:.{digits}g}") for name, value in figures.items()}
