"""Recipes as files: what they hold, and what is refused."""

from __future__ import annotations

import pytest

from flexidepth.errors import ModelNotFoundError, ValueOutOfRangeError
from flexidepth.training.command import changed_recipe, find_recipe, shipped_recipes
from flexidepth.training.recipe import Recipe

MINIMAL = {"base_model": "b", "stages": [{"name": "s", "tokens": 10}]}


def test_round_trip():
    recipe = Recipe.from_dict(MINIMAL)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_whole(name):
    recipe = find_recipe(name)
    assert recipe.stages and Recipe.from_dict(recipe.to_dict()) == recipe


def test_the_papers_recipe_has_its_two_stages():
    alignment, annealing = find_recipe("paper").stages
    assert annealing.skip_penalty == pytest.approx(alignment.skip_penalty / 10)
    assert find_recipe("paper").routing["gate"] == "multiplier"


@pytest.mark.parametrize(
    ("tokens", "eval_steps", "looks"),
    [(60 * 64, 1000, 10), (3 * 64, 1000, 1), (1000 * 64, 1000, 25), (1000 * 64, 7, 7)],
)
def test_a_steered_stage_is_looked_at_often_enough(tokens, eval_steps, looks):
    stage = {"name": "s", "tokens": tokens, "target_layers_skipped": 2.0}
    sizes = {"batch_size": 2, "gradient_accumulation": 1, "data": {"length": 32}}
    recipe = Recipe.from_dict(
        {**MINIMAL, **sizes, "stages": [stage, {"name": "free", "tokens": 64}]}
        | {"eval_steps": eval_steps}
    )
    assert recipe.eval_steps_of(recipe.stages[0]) == looks
    assert recipe.eval_steps_of(recipe.stages[1]) == eval_steps


def test_paths_count_from_the_files_own_folder(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "base_model: b\ndata: {train: [a.jsonl, /abs/b.txt]}\nstages: [{name: s, tokens: 1_000}]\n"
    )
    recipe = find_recipe(str(path))
    assert recipe.data.train == [str(tmp_path / "a.jsonl"), "/abs/b.txt"]
    assert recipe.stages[0].tokens == 1000


def test_a_stage_can_have_data_of_its_own(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "base_model: b\ndata: {train: [a], length: 64}\nstages:\n- {name: s, tokens: 10}\n"
        "- {name: t, tokens: 10, data: {train: [c, /d], held_out: [h], loss_on: answers}}\n"
    )
    recipe = find_recipe(str(path))
    first, own = recipe.stages
    assert recipe.data_of(first) is recipe.data and recipe.data.train == [str(tmp_path / "a")]
    data = recipe.data_of(own)
    assert data.train == [str(tmp_path / "c"), "/d"] and data.held_out == [str(tmp_path / "h")]
    assert (data.length, data.loss_on) == (2048, "answers")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    changed = changed_recipe(recipe, train=["x"])
    assert changed.data.train == ["x"] and changed.stages == recipe.stages
    alone = Recipe.from_dict({**recipe.to_dict(), "stages": recipe.to_dict()["stages"][1:]})
    with pytest.raises(ValueOutOfRangeError, match="train given, but every stage"):
        changed_recipe(alone, train=["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": []}, "did you mean 'stages'"),
        ({"stages": []}, "no stages"),
        ({"stages": [{"name": "s"}]}, "stage 0: without tokens"),
        ({"stages": [{"name": "s", "tokens": 0}]}, "tokens is 0"),
        ({"stages": [{"name": "s", "tokens": 1, "lr": 1}]}, "no key 'lr'"),
        ({"stages": [{"name": "s", "tokens": 1, "learning_rate": "1e-4"}]}, "point in it"),
        ({"stages": [{"name": "s", "tokens": 1, "lm": 0.0}]}, "at least one"),
        ({"stages": [{"name": "s", "tokens": 1}, {"name": "s", "tokens": 2}]}, "must differ"),
        (
            {"stages": [{"name": "s", "tokens": 1, "budgets": [1], "target_layers_skipped": 2.0}]},
            "choose one",
        ),
        ({"stages": [{"name": "s", "tokens": 1, "adapter": 1.0}]}, "set lm: 0.0"),
        ({"stages": [{"name": "s", "tokens": 1, "exploration": 1.0}]}, "shares"),
        ({"stages": [{"name": "s", "tokens": 1, "seed": -1}]}, "stage 's': seed is -1"),
        ({"seed": 1 << 32}, "recipe: seed is 4294967296"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"batch_size": True}, "batch_size is True"),
        ({"data": {"train": "x"}}, "wanted a list"),
        ({"data": 3}, "keys and values"),
        ({"stages": [{"name": "s", "tokens": 1, "data": 3}]}, "stage 0: data: wanted keys and val"),
        (
            {"stages": [{"name": "s", "tokens": 1, "data": {"lenght": 3}}]},
            "stage 0: data: no key 'lenght'; did you mean 'length'",
        ),
        (
            {"stages": [{"name": "s", "tokens": 1, "data": {"held_out": ["h"]}}]},
            "stage 's' has data without train",
        ),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueOutOfRangeError, match=message):
        Recipe.from_dict({**MINIMAL, **change})


def test_not_yaml(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("a: [b")
    with pytest.raises(ValueOutOfRangeError, match="not YAML"):
        find_recipe(str(path))
    with pytest.raises(ModelNotFoundError, match="paper"):
        find_recipe("no-such-recipe")


def test_options_take_the_place_of_what_the_recipe_says():
    recipe = find_recipe("smollm2-135m")
    changed = changed_recipe(recipe, train=["x"], target_layers_skipped=4, start="r")
    assert changed.data.train == ["x"] and changed.start == "r"
    assert changed.base_model == recipe.base_model
    adapters, *routed = changed.stages
    assert adapters.target_layers_skipped is None and len(routed) == 2
    for stage in routed:
        assert stage.target_layers_skipped == 4.0 and stage.budgets is None


def test_single_values_can_be_set():
    recipe = find_recipe("smollm2-135m")
    settings = [
        "batch_size=1",
        "data.length=64",
        "routing.ablations=[no_adapter]",
        "stages.budgets.tokens=4_096",
        "stages.budgets.budgets=[4]",
        "start=null",
    ]
    changed = changed_recipe(recipe, train=["x"], settings=settings)
    assert (changed.batch_size, changed.data.length, changed.data.train) == (1, 64, ["x"])
    assert changed.routing == {**recipe.routing, "ablations": ["no_adapter"]}
    adapters, budgets, further = changed.stages
    assert (adapters, further) == (recipe.stages[0], recipe.stages[2])
    assert (budgets.tokens, budgets.budgets) == (4096, [4])
    assert recipe.stages[1].tokens != 4096 and budgets.kl == recipe.stages[1].kl


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_size", "wanted KEY=VALUE"),
        ("=3", "wanted KEY=VALUE"),
        ("data=3", "wanted KEY=VALUE"),
        ("stages.budgets=3", "wanted KEY=VALUE"),
        ("optimizer.lr=3", "wanted KEY=VALUE"),
        ("stages.tokens.n=3", "no stage 'tokens'; there are adapters, budgets, further"),
        ("batchsize=3", "did you mean 'batch_size'"),
        ("data.lenght=3", "did you mean 'length'"),
        ("batch_size=much", "wanted int"),
        ("batch_size=[1", "not YAML"),
        ("batch_size=0", "batch_size is 0"),
    ],
)
def test_settings_that_are_refused(setting, message):
    with pytest.raises(ValueOutOfRangeError, match=message):
        changed_recipe(find_recipe("smollm2-135m"), settings=[setting])


def test_a_start_beside_the_recipe_is_found_from_anywhere(tmp_path):
    (tmp_path / "routing").mkdir()
    path = tmp_path / "r.yaml"
    for start, want in (("routing", str(tmp_path / "routing")), ("a/model", "a/model")):
        path.write_text(f"base_model: b\nstart: {start}\nstages: [{{name: s, tokens: 1}}]\n")
        assert find_recipe(str(path)).start == want
