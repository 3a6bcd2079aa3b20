"""Which text a stage sees, and in which order."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from flexidepth.errors import (
    ValueOutOfRangeError,
)
from flexidepth.training import command
from flexidepth.training.run import run_recipe

from .runs import ADAPTERS, BUDGETS, LENGTH, Sequences, losses, recipe


def test_a_stage_with_a_seed_sees_the_text_in_another_order(base, data, tmp_path):
    seen: list[int] = []

    class Watched(Sequences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            seen.append(int(index))
            return super().__getitem__(index)

    watched = dataclasses.replace(data, train=Watched(64, 1), held_out=None)
    stages = [{**ADAPTERS, "name": name} for name in ("one", "two", "three")]
    stages[2]["seed"] = 1
    run_recipe(recipe(base, *stages), tmp_path / "run", watched)
    seen = seen[4:]  # the text is marked by those
    of_one = len(seen) // 3
    one, two, three = seen[:of_one], seen[of_one : 2 * of_one], seen[2 * of_one :]
    assert one == two and one != three and len(set(three)) >= 24


def test_a_stage_with_data_sees_its_own_text(base, data, tmp_path):
    class Named(Sequences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            seen.append(self)
            return super().__getitem__(index)

    seen: list[Named] = []
    shared, own, held_out = Named(64, 1), Named(64, 3), Named(4, 4)
    text = {"train": ["own.jsonl"], "length": LENGTH // 2}
    plan = recipe(base, ADAPTERS, {**ADAPTERS, "name": "own", "data": text})
    both = dataclasses.replace(
        data,
        train=shared,
        stages={"own": dataclasses.replace(data, train=own, held_out=held_out)},
    )
    run_recipe(plan, tmp_path / "run", both)
    after_marks = seen[12:]  # of four sequences each
    first = after_marks.index(own)
    assert set(after_marks[:first]) == {shared} and set(after_marks[first:]) == {own, held_out}
    logs = [losses(tmp_path / "run" / name) for name in ("adapters", "own")]
    assert [len(log) for log in logs] == [6, 12]  # tokens are counted in its own sequences
    for name, count in (("own", 63), ("moved", 64)):
        other = dataclasses.replace(both.stages["own"], train=Sequences(count, 3))
        changed = dataclasses.replace(both, stages={"own": other})
        if name == "moved":
            text["train"] = ["elsewhere.jsonl"]
            moved = recipe(base, ADAPTERS, {**ADAPTERS, "name": "own", "data": text})
            run_recipe(moved, tmp_path / "run", changed, resume=True)
        else:
            with pytest.raises(ValueOutOfRangeError, match="text of own was '64 sequences, "):
                run_recipe(plan, tmp_path / "run", changed, resume=True)


@pytest.mark.parametrize("every", [False, True])
def test_text_is_read_for_each_stage(base, monkeypatch, every):
    made: list[tuple[list[str], str, int]] = []

    def packed(sources: list[str], _: Any, *, split: str, length: int, **__: Any) -> list[int]:
        made.append((sources, split, length))
        return [0] * 40

    class Opened:
        def tokenizer(self) -> object:
            return object()

    monkeypatch.setattr("flexidepth.training.dataset.load_packed", packed)
    monkeypatch.setattr(command, "open_checkpoint", lambda _: Opened())
    own = {"train": ["own"], "held_out": ["h"], "length": 8}
    first = {**ADAPTERS, "data": {"train": ["first"]}} if every else ADAPTERS
    plan = recipe(
        base, first, {**BUDGETS, "data": own}, data={} if every else {"train": ["a"], "length": 16}
    )
    loaded = command.load_data(plan, lambda _: None)
    assert (["own"], "all", 8) in made and (["h"], "all", 8) in made and len(made) == 4
    if every:
        assert (["first"], "held_out", 2048) in made and set(loaded.stages) == {
            "adapters",
            "budgets",
        }
    else:
        assert (["a"], "train", 16) in made and set(loaded.stages) == {"budgets"}
        assert loaded.of(plan.stages[0]) is loaded
    assert loaded.of(plan.stages[1]) is loaded.stages["budgets"]
    with pytest.raises(ValueOutOfRangeError, match="no text to train on"):
        command.load_data(recipe(base, ADAPTERS, {**BUDGETS, "data": own}), lambda _: None)
