"""The folder of a run: whose it is, who may go on in it, and that one does at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flexidepth.errors import (
    SaveError,
    ValueOutOfRangeError,
)
from flexidepth.training import run as run_module
from flexidepth.training.claim import claim
from flexidepth.training.lock import run_lock
from flexidepth.training.recipe import Recipe
from flexidepth.training.run import run_recipe
from flexidepth.training.start import starting_model

from .runs import ADAPTERS, BUDGETS, STEERED, Sequences, recipe


def test_another_recipe_is_refused(base, data, tmp_path):
    run_recipe(recipe(base, ADAPTERS), tmp_path / "run", data)
    with pytest.raises(ValueOutOfRangeError, match="another recipe"):
        run_recipe(recipe(base, ADAPTERS, seed=1), tmp_path / "run", data, resume=True)
    for text in (Sequences(64, 5), Sequences(63, 1)):
        with pytest.raises(ValueOutOfRangeError, match="text was '64 sequences, "):
            other = dataclasses.replace(data, train=text)
            run_recipe(recipe(base, ADAPTERS), tmp_path / "run", other, resume=True)


def test_a_run_of_an_older_version_goes_on(base, data, tmp_path):
    """Which knew fewer keys; they take their defaults, and others count still."""
    plan = recipe(base, ADAPTERS)
    first = run_recipe(plan, tmp_path / "run", data)
    path = tmp_path / "run" / "recipe.json"
    content = json.loads(path.read_text())
    del content["recipe"]["estimator"], content["recipe"]["stages"][0]["seed"]
    path.write_text(json.dumps(content))
    assert run_recipe(plan, tmp_path / "run", data, resume=True) == first
    for other in (
        recipe(base, ADAPTERS, estimator="sparsemixer"),
        recipe(base, {**ADAPTERS, "seed": 1}),
    ):
        with pytest.raises(ValueOutOfRangeError, match="another recipe"):
            run_recipe(other, tmp_path / "run", data, resume=True)


def test_a_folder_in_which_another_process_trains_is_refused(base, data, tmp_path):
    plan = recipe(base, ADAPTERS)
    with run_lock(tmp_path / "run"), pytest.raises(SaveError, match="another process is training"):
        run_recipe(plan, tmp_path / "run", data, resume=True)
    assert not (tmp_path / "run" / "recipe.json").exists()
    with (
        pytest.raises(ValueOutOfRangeError, match="budgets"),
        pytest.MonkeyPatch.context() as patch,
    ):
        # Held while it trains, too, and let go of after an error.
        patch.setattr(run_module, "starting_model", lambda plan: held(plan, tmp_path / "run"))
        run_recipe(recipe(base, {**BUDGETS, "budgets": [5]}), tmp_path / "run", data)
    with run_lock(tmp_path / "run"):
        pass


def held(plan: Recipe, folder: Path) -> Any:
    with pytest.raises(SaveError, match="another process is training"):
        run_lock(folder).__enter__()
    return starting_model(plan)


def test_what_only_changes_speed_may_differ(base, data, tmp_path):
    first = run_recipe(recipe(base, ADAPTERS), tmp_path / "run", data)
    other = recipe(base, ADAPTERS, batch_size=4, gradient_accumulation=1, save_steps=3)
    assert run_recipe(other, tmp_path / "run", data, resume=True) == first
    with pytest.raises(ValueOutOfRangeError, match="sequences a step was 4, is 8"):
        run_recipe(
            recipe(base, ADAPTERS, gradient_accumulation=4), tmp_path / "run", data, resume=True
        )


@pytest.mark.parametrize(
    ("change", "held_out", "message"),
    [
        ({"eval_steps": 2}, Sequences(4, 2), "eval_steps was 4, is 2"),
        ({"eval_sequences": 3}, Sequences(4, 2), "eval_sequences was 16, is 3"),
        ({}, Sequences(4, 3), "held_out was '4 sequences, "),
    ],
)
def test_what_steers_a_target_may_not_differ(base, data, tmp_path, change, held_out, message):
    run_recipe(recipe(base, STEERED), tmp_path / "run", data)
    other = dataclasses.replace(data, held_out=held_out)
    with pytest.raises(ValueOutOfRangeError, match=message):
        run_recipe(recipe(base, STEERED, **change), tmp_path / "run", other, resume=True)
    # Without a target it is looked at and no more.
    first = run_recipe(recipe(base, ADAPTERS), tmp_path / "free", data)
    again = run_recipe(recipe(base, ADAPTERS, **change), tmp_path / "free", other, resume=True)
    assert again == first


def test_a_recipe_is_on_disk_whole_or_not_at_all(base, data, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            claim(tmp_path, recipe(base, ADAPTERS), resume=False, sequences=4, marks={"text": "x"})
    assert not (tmp_path / "recipe.json").exists()
    claim(tmp_path, recipe(base, ADAPTERS), resume=False, sequences=4, marks={"text": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_result_that_is_there_is_not_trained_again(base, data, tmp_path, monkeypatch):
    plan = recipe(base, ADAPTERS)
    result = run_recipe(plan, tmp_path / "run", data)
    monkeypatch.setattr(run_module, "_run_stage", lambda *_: pytest.fail("trained again"))
    assert run_recipe(plan, tmp_path / "run", data, resume=True) == result
    shutil.rmtree(result)
    with pytest.raises(pytest.fail.Exception):
        run_recipe(plan, tmp_path / "run", data, resume=True)
