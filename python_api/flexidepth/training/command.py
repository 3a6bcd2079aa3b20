"""From a recipe's name and the options of a command to a finished run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Subset

from ..checkpoints import open_checkpoint
from ..errors import ModelNotFoundError, ValueOutOfRangeError
from .recipe import Recipe
from .run import TrainingData, run_recipe
from .settings import with_settings

if TYPE_CHECKING:
    from .dataset import PackedDataset

_SHIPPED = Path(__file__).parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def find_recipe(name: str) -> Recipe:
    """The recipe in a file, or the shipped one of that name."""
    for path in (Path(name), _SHIPPED / f"{name}.yaml"):
        if path.is_file():
            return Recipe.read(path)
    raise ModelNotFoundError(
        f"recipe {name!r}: no such file, and the package has only {', '.join(shipped_recipes())}"
    )


def changed_recipe(
    recipe: Recipe,
    *,
    train: list[str] | None = None,
    held_out: list[str] | None = None,
    skip_broken: bool | None = None,
    base_model: str | None = None,
    start: str | None = None,
    target_layers_skipped: float | None = None,
    settings: Sequence[str] = (),
) -> Recipe:
    """The recipe with the options of a command put in; None leaves a value as it is.

    target_layers_skipped goes to every stage that trains routers, where it takes the place of budgets.
    settings: single values by name, see training.settings; they are put in last.
    """

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    data = given(train=train, held_out=held_out, skip_broken=skip_broken)
    stages = recipe.stages
    if target_layers_skipped is not None:
        target = float(target_layers_skipped)
        stages = [
            stage
            if stage.adapter
            else dataclasses.replace(stage, target_layers_skipped=target, budgets=None)
            for stage in stages
        ]
    changed = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, **data),
        stages=stages,
        **given(base_model=base_model, start=start),
    )
    return with_settings(changed, settings) if settings else changed


def train_recipe(
    recipe: Recipe,
    output_dir: Path | str,
    *,
    resume: bool = False,
    notify: Callable[[str], None] = lambda _: None,
) -> Path:
    """Prepare a recipe's data, train, and return the directory of the routing checkpoint.

    Args:
        notify: takes a line about what is being done.
    """
    for stage in recipe.stages:
        if (steps := recipe.eval_steps_of(stage)) < recipe.eval_steps:
            notify(
                f"stage {stage.name}: held-out text every {steps} steps, not {recipe.eval_steps}: by what it skips the "
                f"penalty is steered to {stage.target_layers_skipped:g} layers"
            )
    return run_recipe(recipe, output_dir, load_data(recipe, notify), resume=resume)


def load_data(recipe: Recipe, notify: Callable[[str], None]) -> TrainingData:
    """A recipe's packed sequences. Without held-out text of its own, a share of the documents is held out."""
    from .dataset import load_packed
    from .packing import collate

    if not recipe.data.train:
        raise ValueOutOfRangeError("training: no text to train on; give --train or data.train")
    tokenizer = open_checkpoint(recipe.base_model).tokenizer()
    if tokenizer is None:
        raise ValueOutOfRangeError(
            f"training: {recipe.base_model} has no tokenizer, without which text cannot be read"
        )
    own = bool(recipe.data.held_out)

    def packed(sources: list[str], split: str) -> PackedDataset:
        return load_packed(
            sources,
            tokenizer,
            num_proc=recipe.data.num_proc,
            notify=notify,
            length=recipe.data.length,
            loss_on=recipe.data.loss_on,
            seed=recipe.seed,
            split="all" if own else split,
            skip_broken=recipe.data.skip_broken,
        )

    train = packed(recipe.data.train, "train")
    held_out = packed(recipe.data.held_out or recipe.data.train, "held_out")
    shown = Subset(held_out, range(min(len(held_out), recipe.eval_sequences)))
    return TrainingData(train, shown, functools.partial(collate, document_ids=True))
