"""What the tests of whole runs share: texts, a recipe, its stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from flexidepth.training.recipe import Recipe

LENGTH = 32


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Counting texts: each token follows from the one before."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, 64, (count, 2), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        half = torch.arange(LENGTH // 2)
        ids = torch.cat([(start + half) % 64 for start in self.starts[index]])
        labels = ids.clone()
        labels[[0, LENGTH // 2]] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": half.repeat(2),
            "document_ids": torch.arange(2).repeat_interleave(LENGTH // 2),
        }


def recipe(base: Path, *stages: dict[str, Any], **changes: Any) -> Recipe:
    values = {
        "base_model": str(base),
        "routing": {
            "gate": "straight_through",
            "router_reduction_factor": 4,
            "adapter_reduction_factor": 4,
        },
        "gate_bias": 1.0,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 4,
        "precision": "float32",  # what "auto" means depends on the processor
        "data": {"length": LENGTH},
        "stages": list(stages),
    }
    return Recipe.from_dict({**values, **changes})


ADAPTERS = {"name": "adapters", "tokens": 6 * 128, "learning_rate": 3e-3, "lm": 0.0, "adapter": 1.0}


BUDGETS = {
    "name": "budgets",
    "tokens": 6 * 128,
    "learning_rate": 3e-3,
    "router_learning_rate": 1e-3,
    "order_layers": True,
    "lm": 0.0,
    "kl": 1.0,
    "budgets": [0.5, 1],
    "exploration": 0.1,
}


STEERED = {"name": "s", "tokens": 2 * 128, "lm": 1.0, "target_layers_skipped": 1.0}


def losses(folder: Path) -> list[float]:
    rows = json.loads((folder / "log.json").read_text())["history"]
    return [row["loss"] for row in rows if "loss" in row]
