"""From a recipe's name and the options of a command to a finished run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Subset

from ..checkpoints import open_checkpoint
from ..errors import ModelNotFoundError, ValueOutOfRangeError
from .processes import all_processes
from .recipe import DataOptions, Recipe
from .run import Notify, TrainingData, run_recipe
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

    train, held_out and skip_broken are the recipe's: stages with data of their own keep it.
    target_layers_skipped goes to every stage that trains routers, where it takes the place of budgets.
    settings: single values by name, see training.settings; they are put in last.
    """

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    data = given(train=train, held_out=held_out, skip_broken=skip_broken)
    if data and all(stage.data is not None for stage in recipe.stages):
        raise ValueOutOfRangeError(
            f"training: {', '.join(data)} given, but every stage of the recipe has data of its own; change it there"
        )
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
    notify: Notify | None = None,
) -> Path:
    """Prepare a recipe's data, train, and return the directory of the routing checkpoint.

    Of several processes one on each machine prepares the data, and the main one alone speaks.

    Args:
        notify: takes a line about what is being done; None = no such lines, and warnings where a run misses its
            target.
    """
    processes = all_processes()
    say = notify if notify is not None and processes.is_main_process else _silent
    for stage in recipe.stages:
        if (steps := recipe.eval_steps_of(stage)) < recipe.eval_steps:
            say(
                f"stage {stage.name}: held-out text every {steps} steps, not {recipe.eval_steps}: by what it skips the "
                f"penalty is steered to {stage.target_layers_skipped:g} layers"
            )
    with processes.local_main_process_first():
        data = load_data(recipe, say)
    return run_recipe(recipe, output_dir, data, resume=resume, notify=notify)


def _silent(_: str) -> None:
    pass


def load_data(recipe: Recipe, notify: Notify) -> TrainingData:
    """A recipe's packed sequences, and those of stages with data of their own.

    Without held-out text of its own, a share of the documents is held out.
    """
    seen = any(stage.data is None for stage in recipe.stages)  # the recipe's own
    if seen and not recipe.data.train:
        raise ValueOutOfRangeError("training: no text to train on; give --train or data.train")
    tokenizer = open_checkpoint(recipe.base_model).tokenizer()
    if tokenizer is None:
        raise ValueOutOfRangeError(
            f"training: {recipe.base_model} has no tokenizer, without which text cannot be read"
        )
    stages = {
        stage.name: _load(recipe, stage.data, tokenizer, notify)
        for stage in recipe.stages
        if stage.data is not None
    }
    first = _load(recipe, recipe.data, tokenizer, notify) if seen else stages[recipe.stages[0].name]
    return dataclasses.replace(first, stages=stages)


def _load(recipe: Recipe, data: DataOptions, tokenizer: Any, notify: Notify) -> TrainingData:
    from .dataset import load_packed
    from .packing import collate

    own = bool(data.held_out)

    def packed(sources: list[str], split: str) -> PackedDataset:
        return load_packed(
            sources,
            tokenizer,
            num_proc=data.num_proc,
            notify=notify,
            length=data.length,
            loss_on=data.loss_on,
            seed=recipe.seed,
            split="all" if own else split,
            skip_broken=data.skip_broken,
        )

    train = packed(data.train, "train")
    held_out = packed(data.held_out or data.train, "held_out")
    shown = Subset(held_out, range(min(len(held_out), recipe.eval_sequences)))
    return TrainingData(train, shown, functools.partial(collate, document_ids=True))
