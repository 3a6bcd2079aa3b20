"""Where a steered penalty starts, and what is said of a target that was missed."""

from __future__ import annotations

import pytest
import torch

from flexidepth.training.objective import RoutingObjective, Weights
from flexidepth.training.penalty_start import balancing_penalty, missed_target
from flexidepth.training.recipe import Stage
from flexidepth.training.start import starting_model

from .runs import BUDGETS, recipe


@pytest.mark.parametrize("gate", ["straight_through", "multiplier"])
def test_a_balancing_penalty_leaves_the_gates_where_they_are(base, data, gate):
    routing = {"gate": gate, "router_reduction_factor": 4, "adapter_reduction_factor": 4}
    model = starting_model(recipe(base, BUDGETS, routing=routing))
    batch = data.collate([data.train[i] for i in range(4)])
    before = torch.get_rng_state()
    alpha = balancing_penalty(model, batch, Weights(lm=0.0, kl=1.0))
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())

    def pull(penalty: float) -> float:
        """Slope of the loss along the biases of all routers."""
        model.zero_grad()
        weights = Weights(lm=0.0, kl=1.0, skip_penalty=penalty)
        RoutingObjective(model)(**batch, weights=weights)["loss"].backward()
        return sum(float(layer.router.head.bias.grad) for layer in model.routed_layers())

    assert alpha > 1e-4 and pull(0.0) < 0
    assert pull(alpha) == pytest.approx(0.0, abs=1e-3 * abs(pull(0.0)))


def test_gates_that_nothing_moves_are_no_obstacle(base, data):
    model = starting_model(recipe(base, BUDGETS, gate_bias=200.0))
    batch = data.collate([data.train[0]])
    assert balancing_penalty(model, batch, Weights(lm=0.0, kl=1.0)) == 0.0


STAGE = Stage("s", 640, lm=1.0, target_layers_skipped=4.0)


@pytest.mark.parametrize(
    ("history", "told"),
    [
        ([], None),
        ([{"step": 1, "layers_skipped": 3.6}], None),
        (
            [{"step": 1, "layers_skipped": 0.2, "alpha": 0.012}],
            "training text skips 0.20 layers at its end, target_layers_skipped is 4: give more tokens (it had 640), "
            "a larger skip_penalty (it ended at 0.012), or budgets: [4]",
        ),
        (  # the last steps alone
            [{"step": i, "layers_skipped": 9.0 if i <= 10 else 3.0} for i in range(1, 21)],
            "training text skips 3.00 layers",
        ),
        (  # held-out text where there is some
            [{"step": 1, "eval_layers_skipped": 1.0}, {"step": 2, "layers_skipped": 4.0}],
            "held-out text skips 1.00 layers",
        ),
        (
            [{"step": 1, "eval_layers_skipped": 1.0}, {"step": 2, "eval_layers_skipped": 5.1}],
            "held-out text skips 5.10 layers at its end, target_layers_skipped is 4: give more tokens (it had 640), a "
            "smaller skip_penalty, or",
        ),
        ([{"step": 1, "eval_layers_skipped": 1.0}, {"step": 2, "eval_layers_skipped": 4.4}], None),
    ],
)
def test_a_missed_target_is_told(history, told):
    line = missed_target(STAGE, history)
    assert line is None if told is None else told in line
    assert missed_target(Stage("s", 640), history) is None
