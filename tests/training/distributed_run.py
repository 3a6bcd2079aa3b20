"""A run of the recipe of runs.py, started by torch.distributed.run with several processes.

Arguments: folder of the base model, folder for the run.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from flexidepth.training import command
from flexidepth.training.packing import collate
from flexidepth.training.recipe import Recipe
from flexidepth.training.run import TrainingData

from .runs import ADAPTERS, BUDGETS, Sequences, recipe

STAGES = ({**ADAPTERS, "fit_adapters": 64}, {**BUDGETS, "exploration": 0.0})
RECORD = ".record"  # beside the run: who read the text, and what was said


def main(base: str, folder: str, *, accumulation: int = 1) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")

    def note(line: str) -> None:
        with Path(folder + RECORD).open("a") as file:
            file.write(line + "\n")

    def read(_: Recipe, notify: Callable[[str], None]) -> TrainingData:
        note(f"{rank} reads")
        notify("read")
        time.sleep(0.5)  # long enough for another process to come in between
        note(f"{rank} has read")
        return TrainingData(
            Sequences(64, 1), Sequences(4, 2), functools.partial(collate, document_ids=True)
        )

    plan = recipe(Path(base), *STAGES, gradient_accumulation=accumulation)
    with mock.patch.object(command, "load_data", read):
        command.train_recipe(plan, folder, notify=lambda line: note(f"said by {rank}: {line}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
