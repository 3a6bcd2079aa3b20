"""A run of test_run's recipe, started by torch.distributed.run with several processes.

Arguments: folder of the base model, folder for the run.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from flexidepth.training.packing import collate
from flexidepth.training.run import TrainingData, run_recipe

from .test_run import ADAPTERS, BUDGETS, Sequences, recipe

STAGES = ({**ADAPTERS, "fit_adapters": 64}, {**BUDGETS, "exploration": 0.0})


def main(base: str, folder: str, *, accumulation: int = 1) -> None:
    torch.set_num_threads(1)
    data = TrainingData(
        Sequences(64, 1), Sequences(4, 2), functools.partial(collate, document_ids=True)
    )
    plan = recipe(Path(base), *STAGES, gradient_accumulation=accumulation)
    run_recipe(plan, folder, data)


if __name__ == "__main__":
    main(*sys.argv[1:])
