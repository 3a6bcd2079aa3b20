"""Controllers that steer towards a number of layers skipped."""

from __future__ import annotations

import math

import pytest
import torch

from flexidepth.errors import ValueOutOfRangeError
from flexidepth.training.steering import BudgetController, PenaltyController


def test_penalty_rises_while_too_few_layers_are_skipped_and_settles():
    controller = PenaltyController(1e-4, target=4.0, gain=0.05)
    skipped = 0.0
    for _ in range(400):
        # A model that skips more the larger alpha is, with some inertia.
        skipped += 0.2 * (min(15.0, controller.alpha * 1000) - skipped)
        controller.update(skipped)
    assert skipped == pytest.approx(4.0, abs=0.2)
    assert controller.alpha == pytest.approx(4e-3, rel=0.1)


def test_the_target_is_met_on_held_out_text():
    controller = PenaltyController(1e-4, target=4.0)
    skipped = 0.0
    for step in range(2000):
        skipped += 0.2 * (min(15.0, controller.alpha * 1000) - skipped)
        controller.update(skipped)
        if step == 500:
            assert skipped == pytest.approx(4.0, abs=0.2)
        if step >= 500 and step % 50 == 0:
            controller.held_out(skipped - 1.5)  # held-out text skips less
            again = PenaltyController(1e-4, target=4.0)
            again.load_state_dict(controller.state_dict())
            controller = again
    assert skipped - 1.5 == pytest.approx(4.0, abs=0.2)


def test_penalty_stays_within_reach_of_its_start():
    controller = PenaltyController(1e-4, target=10.0, gain=5.0)
    for _ in range(50):
        controller.update(0.0)
    assert controller.alpha == pytest.approx(1.0)
    with pytest.raises(ValueOutOfRangeError, match="penalty of 0"):
        PenaltyController(0, 4.0)


class Routers:
    """Logits of 15 gates that follow Adam's steps on a loss to skip and a penalty on what runs, like real ones."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.generator = steps, torch.Generator().manual_seed(seed)
        order = torch.randn(15, generator=self.generator)
        self.bias = (2 + order).double()
        tokens = 0.3 * torch.randn(60, 15, generator=self.generator)
        self.tokens, self.costs = tokens.double(), (0.1 * order.exp()).double()
        self.moments = [torch.zeros(15).double(), torch.zeros(15).double()]

    def slopes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the loss and of the penalty [gates]; running gates learn from 5 % of the tokens."""
        gates = torch.sigmoid(self.bias + self.tokens)
        spread, run = gates * (1 - gates), gates > 0.5
        drawn = run & (torch.rand(run.shape, generator=self.generator) < 0.05)
        learn = (~run).double() + 4 * drawn
        crowd = 1 + 0.15 * (~run).sum(1, keepdim=True)
        loss = -(learn * self.costs * crowd * spread).mean(0)
        return loss, (2 * gates.sum(1, keepdim=True) * spread).mean(0)

    def step(self, number: int, alpha: float) -> float:
        """Mean layers skipped, before the step."""
        loss, penalty = self.slopes()
        slope = loss + alpha * penalty
        first, second = self.moments
        first.mul_(0.9).add_(0.1 * slope)
        second.mul_(0.95).add_(0.05 * slope**2)
        rate = 0.15 * (1 + math.cos(math.pi * number / self.steps))
        mean, size = first / (1 - 0.9**number), (second / (1 - 0.95**number)).sqrt()
        skipped = self.skipped()
        self.bias -= rate * mean / size.clamp(min=1e-12)
        return skipped

    def skipped(self) -> float:
        return float((self.bias + self.tokens <= 0).sum(1).double().mean())


def steered(steps: int, seed: int, *, balanced: bool) -> float:
    """What a run with the target 4 skips at its end."""
    routers, controller = Routers(steps, seed), PenaltyController(1e-4, 4.0)
    if balanced:
        loss, penalty = routers.slopes()
        controller.begin(float(-loss.sum() / penalty.sum()))
    for number in range(1, steps + 1):
        controller.update(routers.step(number, controller.alpha))
    return routers.skipped()


@pytest.mark.parametrize(("steps", "within"), [(60, 1.0), (240, 0.5), (1500, 0.2)])
def test_short_and_long_runs_meet_their_target_from_a_balanced_start(steps, within):
    for seed in range(4):
        assert steered(steps, seed, balanced=True) == pytest.approx(4.0, abs=within)


def test_a_short_run_from_a_low_start_comes_too_late():
    assert max(steered(60, seed, balanced=False) for seed in range(4)) < 3.0


def test_a_state_keeps_the_start():
    controller = PenaltyController(1e-4, target=4.0)
    controller.begin(0.1)
    again = PenaltyController(1e-4, target=4.0, gain=100.0)
    again.load_state_dict(controller.state_dict())
    again.update(0.0)
    assert again.alpha == pytest.approx(1e3)  # as far from its start as it may go
    old = {name: value for name, value in controller.state_dict().items() if name != "start"}
    again = PenaltyController(1e-4, target=4.0)
    again.load_state_dict(old)
    assert again.start == 1e-4 and again.alpha == pytest.approx(0.1)


def test_budgets_find_their_offsets():
    generator = torch.Generator().manual_seed(0)
    logits = 2 + torch.randn(2000, 15, generator=generator)
    controller = BudgetController([1, 4, 8], 15, gain=0.03)
    controller.start(logits[:200])
    logits = logits + 0.5  # the model has moved since
    for step in range(300):
        chosen = controller.choose(6, step, seed=0)
        skipped = []
        for offset in controller.offset(chosen).tolist():
            rows = torch.randint(0, 2000, (64,), generator=generator)
            skipped.append(float((logits[rows] <= offset).sum(-1).float().mean()))
        controller.update(chosen, skipped, [0.0] * 6)
    got = [float((logits <= offset).sum(-1).float().mean()) for offset in controller.offsets]
    assert got == pytest.approx([1, 4, 8], abs=0.3)


def test_budgets_are_drawn_evenly_and_repeatably():
    controller = BudgetController([1, 2, 4, 8], 15)
    drawn = [controller.choose(4, step, seed=1) for step in range(50)]
    assert all(sorted(row) == [0, 1, 2, 3] for row in drawn)
    assert len({tuple(row) for row in drawn}) > 10
    assert drawn == [BudgetController([1, 2, 4, 8], 15).choose(4, s, seed=1) for s in range(50)]
    assert drawn != [controller.choose(4, step, seed=2) for step in range(50)]


def test_neighbours_never_swap():
    controller = BudgetController([1, 2], 15)
    controller.load_state_dict({"offsets": [0.5, 0.51], "prices": [0.0, 0.0]})
    controller.update([0, 1], [0.0, 15.0], [0.0, 0.0])
    assert controller.offsets == sorted(controller.offsets)


@pytest.mark.parametrize("budgets", [[], [0, 1], [4, 2], [2, 2], [1, 15]])
def test_wrong_budgets(budgets):
    with pytest.raises(ValueOutOfRangeError, match="budgets"):
        BudgetController(budgets, 15)


def test_state_of_another_number_of_budgets_is_refused():
    controller = BudgetController([1, 2], 15)
    with pytest.raises(ValueOutOfRangeError, match="3 budgets, this recipe has 2"):
        controller.load_state_dict({"offsets": [0.1, 0.2, 0.3], "prices": [0.0] * 3})
    with pytest.raises(ValueOutOfRangeError, match="start"):
        controller.offset([0])


def test_a_price_balances_the_slope():
    controller = BudgetController([2], 4)
    controller.start(torch.linspace(0, 4, 100).view(25, 4))
    for _ in range(40):
        # The loss falls by 0.3 for each layer more that is run; what is left is that and the price.
        controller.update([0], [2.0], [controller.price([0]).item() - 0.3])
    assert controller.price([0]).item() == pytest.approx(0.3, rel=1e-3)
