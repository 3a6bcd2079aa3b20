"""Runs that are steered to a number of layers skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flexidepth.errors import (
    ValueOutOfRangeError,
)
from flexidepth.training import command
from flexidepth.training.run import TrainingData, run_recipe

from .runs import BUDGETS, STEERED, Sequences, losses, recipe


def test_a_missed_target_is_told_at_the_end_of_its_stage(base, data, tmp_path):
    said: list[str] = []
    run_recipe(recipe(base, STEERED), tmp_path / "told", data, notify=said.append)
    assert len(said) == 1 and "held-out text skips" in said[0] and "budgets: [1]" in said[0]
    with pytest.warns(UserWarning, match="target_layers_skipped is 1"):
        run_recipe(recipe(base, STEERED), tmp_path / "warned", data)


def test_a_steered_penalty_starts_balanced(base, data, tmp_path):
    for name, own in (("balanced", 0.0), ("larger", 30.0)):
        run_recipe(
            recipe(base, {**STEERED, "skip_penalty": own}, save_steps=1), tmp_path / name, data
        )
    starts = [
        json.loads((tmp_path / name / "s" / "checkpoint-1" / "steering.json").read_text())["start"]
        for name in ("balanced", "larger")
    ]
    assert starts[0] > 1e-3 and starts[1] == 30.0


def test_steering_goes_by_held_out_text(base, data, tmp_path):
    stage = {"name": "s", "tokens": 128, "lm": 1.0, "target_layers_skipped": 1.0}
    run_recipe(recipe(base, stage, save_steps=1), tmp_path / "run", data)
    folder = tmp_path / "run" / "s"
    state = json.loads((folder / "checkpoint-1" / "steering.json").read_text())
    rows = json.loads((folder / "log.json").read_text())["history"]
    found = next(row["eval_layers_skipped"] for row in rows if "eval_layers_skipped" in row)
    assert state["apart"] == pytest.approx(0.3 * (state["mean"] - found), abs=1e-3)
    assert state["apart"] != 0


def test_a_target_is_met_on_held_out_text(base, data, tmp_path):
    """Which skips less here than the training text, of sixteen tokens alone; the recipe would look at it too rarely."""

    class Few(Sequences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            item = super().__getitem__(index)
            return {**item, "input_ids": item["input_ids"] % 16}

    stage = {
        "name": "s",
        "tokens": 200 * 128,
        "learning_rate": 5e-3,
        "final_learning_rate": 1.0,
        "lm": 0.0,
        "kl": 1.0,
        "skip_penalty": 0.05,
        "target_layers_skipped": 1.0,
    }
    plan = recipe(base, stage, eval_steps=1000, save_steps=1000)
    run_recipe(plan, tmp_path, TrainingData(Few(64, 1), Sequences(8, 2), data.collate))
    rows = json.loads((tmp_path / "s" / "log.json").read_text())["history"]
    found = {r["step"]: r["eval_layers_skipped"] for r in rows if "eval_layers_skipped" in r}
    assert list(found) == list(range(25, 201, 25))
    assert found[200] == pytest.approx(1.0, abs=0.15)
    trained = [r["layers_skipped"] for r in rows if "loss" in r][-25:]
    assert sum(trained) / len(trained) > 1.3


def test_steering_a_target_more_often_than_the_recipe_says_is_told(base, monkeypatch):
    monkeypatch.setattr(command, "load_data", lambda *_: None)
    monkeypatch.setattr(command, "run_recipe", lambda *_, **__: Path("result"))
    said: list[str] = []
    for plan in (recipe(base, STEERED, eval_steps=1000), recipe(base, BUDGETS, eval_steps=1000)):
        command.train_recipe(plan, "run", notify=said.append)
    assert len(said) == 1 and "stage s: held-out text every 1 steps, not 1000" in said[0]


@pytest.mark.parametrize("target", [0, 2, 7.5])
def test_a_target_that_cannot_be_met(base, data, tmp_path, target):
    stage = {"name": "s", "tokens": 128, "target_layers_skipped": target}
    with pytest.raises(ValueOutOfRangeError, match="between 0 and 2"):
        run_recipe(recipe(base, stage), tmp_path / "run", data)


def test_looking_at_held_out_text_changes_nothing(base, data, tmp_path):
    """Training draws from the same generator as before, however often it is looked at."""
    for steps in (1, 1000):
        run_recipe(recipe(base, BUDGETS, eval_steps=steps), tmp_path / str(steps), data)
    often, never = (losses(tmp_path / str(steps) / "budgets") for steps in (1, 1000))
    assert often == never
