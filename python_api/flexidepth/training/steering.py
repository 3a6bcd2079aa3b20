"""Steering training to a wanted mean number of layers skipped.

Two ways. With one target the weight alpha of the layer penalty follows the target. With several budgets each
sequence is trained at one of them: a budget moves the logits s of all gates by an offset b that follows its
own target, w = sigmoid(s - b), so that one set of routers learns an order of what to skip, and a threshold
chooses how much. Were b at each moment the very quantile of the logits that meets the budget, the
derivative through it would take off the mean of the others' slopes,

    dL/ds_i = w_i' (G_i - mean_w' G),   G_i = dL/dw_i,   mean weighted by w' = w (1 - w),

and a price for running a layer that equals -mean_w' G does the same: without it, running being nearly always
better than skipping, all logits would rise together and carry no order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ValueOutOfRangeError

_HELD_OUT_SHARE = 0.3
_RANGE = 1e4  # how far alpha may leave its start, either way
_STATE = ("start", "log_alpha", "mean", "apart")  # of a PenaltyController


class PenaltyController:
    """alpha that rises while fewer layers are skipped than wanted, and falls while more are.

    log alpha += gain * (target + apart - skipped), an integral controller; `skipped` is the mean of the last steps,
    `apart` how many layers more training text skips than held-out text, on which the target is to be met.
    """

    def __init__(self, alpha: float, target: float, *, gain: float = 0.02, smoothing: float = 0.7):
        if not alpha > 0:
            raise ValueOutOfRangeError(
                f"training: a skip penalty of {alpha} cannot be steered; give one above 0, 1e-4 for example"
            )
        self.target, self.gain, self.smoothing = target, gain, smoothing
        self.begin(alpha)
        self.mean: float | None = None
        self.apart = 0.0

    def begin(self, alpha: float) -> None:
        """Start from this alpha, which it stays within reach of."""
        self.start, self.log_alpha = alpha, math.log(alpha)

    @property
    def alpha(self) -> float:
        """The penalty's weight now."""
        return math.exp(self.log_alpha)

    def update(self, skipped: float) -> None:
        """Take in the mean number of layers that the tokens of a step skipped."""
        kept = self.smoothing if self.mean is not None else 0.0
        self.mean = kept * (self.mean or 0.0) + (1 - kept) * skipped
        moved = self.log_alpha + self.gain * (self.target + self.apart - self.mean)
        start = math.log(self.start)
        self.log_alpha = min(max(moved, start - math.log(_RANGE)), start + math.log(_RANGE))

    def held_out(self, skipped: float) -> None:
        """Take in the mean number of layers that held-out text skips now."""
        if self.mean is not None:  # a part of the way, because the mean lags behind
            self.apart += _HELD_OUT_SHARE * (self.mean - skipped - self.apart)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; what an older one lacks stays as it is."""
        for name in _STATE:
            if name in state:
                setattr(self, name, state[name])


class BudgetController:
    """Offsets of the gates' logits and prices of running a layer, one pair for each budget (mean layers skipped).

    offset += gain * (budget - skipped): a token runs a layer when its logit is above the offset, so more is
    skipped as it rises; at run time the threshold sigmoid(offset) does the same.
    price -= price_gain * slope, slope the mean of dL/dw that is left over (see above), the price included.
    """

    def __init__(
        self,
        budgets: Sequence[float],
        num_routed: int,
        *,
        gain: float = 0.05,
        price_gain: float = 0.3,
    ) -> None:
        wrong = [b for b in budgets if not 0 < b < num_routed]
        if not budgets or wrong or sorted(set(budgets)) != list(budgets):
            raise ValueOutOfRangeError(
                f"training: budgets {list(budgets)}; wanted ascending numbers of layers above 0 and below "
                f"{num_routed}, the number of routed layers"
            )
        self.budgets, self.num_routed = list(budgets), num_routed
        self.gain, self.price_gain = gain, price_gain
        self.offsets: list[float] | None = None
        self.prices = [0.0] * len(self.budgets)

    def start(self, logits: Tensor) -> None:
        """Take the offsets from the logits of a first batch [tokens, routed layers], when there are none yet."""
        if self.offsets is None:
            shares = torch.tensor(self.budgets) / self.num_routed
            # torch.quantile takes no more than 2^24 values.
            values = logits.float().flatten().cpu()[: 1 << 24]
            self.offsets = torch.quantile(values, shares).tolist()

    def choose(self, rows: int, step: int, seed: int) -> list[int]:
        """Which budget each sequence of a step is trained at: evenly drawn, a function of seed and step."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) & 0xFFFFFFFF)
        turns = -(-rows // len(self.budgets))
        order = [torch.randperm(len(self.budgets), generator=generator) for _ in range(turns)]
        numbers: list[int] = torch.cat(order)[:rows].tolist()
        return numbers

    def offset(self, chosen: Sequence[int]) -> Tensor:
        """float32 [len(chosen)], for the model's gate_offset."""
        return torch.tensor([self._started()[i] for i in chosen], dtype=torch.float32)

    def price(self, chosen: Sequence[int]) -> Tensor:
        """float32 [len(chosen)], loss for each layer that a token of the sequence runs."""
        return torch.tensor([self.prices[i] for i in chosen], dtype=torch.float32)

    def update(
        self, chosen: Sequence[int], skipped: Sequence[float], slopes: Sequence[float]
    ) -> None:
        """Take in the mean layers skipped of each sequence and the slope left over in it.

        Every budget moves by the mean of its own sequences.
        """
        offsets = self._started()
        for i, budget in enumerate(self.budgets):
            own = [row for row, number in enumerate(chosen) if number == i]
            if own:
                offsets[i] += self.gain * (budget - sum(skipped[row] for row in own) / len(own))
                self.prices[i] -= self.price_gain * sum(slopes[row] for row in own) / len(own)
        for i in range(1, len(offsets)):  # noise must not swap neighbours
            offsets[i] = max(offsets[i], offsets[i - 1])

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"offsets": self.offsets, "prices": self.prices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; ValueOutOfRangeError if it is of another number of budgets."""
        if len(state["prices"]) != len(self.budgets):
            raise ValueOutOfRangeError(
                f"training: the checkpoint was trained at {len(state['prices'])} budgets, this recipe has "
                f"{len(self.budgets)}: {self.budgets}; resume with the recipe it was started with"
            )
        self.offsets, self.prices = state["offsets"], list(state["prices"])

    def _started(self) -> list[float]:
        if self.offsets is None:
            raise ValueOutOfRangeError("training: budgets without a start; call start() first")
        return self.offsets
