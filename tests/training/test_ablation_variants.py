"""Variants that are compared: all can be trained, alike but for what they vary."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flexidepth import FlexiDepthConfig
from flexidepth.bench.ablations import VARIANTS, WHOLE, main, train_variants
from flexidepth.config import ABLATIONS, has_adapter
from flexidepth.training import command
from flexidepth.training.recipe import Recipe


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Recipe]:
    seen: dict[Path, tuple[Recipe, bool]] = {}

    def note(recipe: Recipe, folder: Path, *, resume: bool, notify: object) -> Path:
        seen[folder] = recipe, resume
        return folder / "routing"

    monkeypatch.setattr(command, "train_recipe", note)
    (tmp_path / "no-adapter").mkdir()
    made = train_variants(list(VARIANTS), 2048, ["text"], tmp_path, lambda _: None)
    assert len(seen) == len(VARIANTS) and seen[tmp_path / "no-adapter"][1]
    assert not seen[tmp_path / "linear-router"][1]
    return {name: seen[path.parent][0] for name, path in made.items()}


def test_variants_differ_from_the_whole_in_their_routing_alone(recipes: dict[str, Recipe]) -> None:
    whole = recipes[WHOLE]
    ablated = set()
    for name, recipe in recipes.items():
        config = FlexiDepthConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            **recipe.routing,
        )
        config.check()
        (stage,) = recipe.stages
        assert stage.tokens == 2048 and bool(stage.fit_adapters) == has_adapter(config.ablations)
        same = dataclasses.replace(
            recipe,
            routing=whole.routing,
            stages=[dataclasses.replace(stage, fit_adapters=whole.stages[0].fit_adapters)],
        )
        assert same == whole
        assert (recipe.routing == whole.routing) == (name == WHOLE)
        ablated |= set(config.ablations)
    assert ablated == set(ABLATIONS)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--skipped", "1,a", "--skipped '1,a': wanted numbers separated by commas"),
        ("--variants", "linear routers", "--variants linear routers: wanted some of whole"),
    ],
)
def test_wrong_usage(tmp_path: Path, option: str, value: str, message: str) -> None:
    app = typer.Typer()
    app.command()(main)
    words = [str(tmp_path), "--train", "x.jsonl", "--prose", "x.jsonl", option, value]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
