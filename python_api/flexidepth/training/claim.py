"""The folder of a run: whose recipe it is, and whether a run may start or go on in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import SaveError, ValueOutOfRangeError
from .recipe import Recipe

RECIPE_FILE = "recipe.json"
# What may differ when a run goes on, on another machine for example: it changes speed and records, not the run.
_FREE = ("precision", "gradient_checkpointing", "logging_steps", "save_steps")
# Free as well, unless a target is steered by what held-out text skips.
_WATCHING = ("eval_steps", "eval_sequences")
# The text's place; what it says is compared by text_mark.
_FREE_DATA = ("train", "held_out", "num_proc")


def text_mark(sequences: Any) -> str:
    """Tells texts apart: how many packed sequences there are, and a digest of some of them."""
    number = len(sequences)
    digest = hashlib.sha256()
    for i in (0, number // 3, number // 2, number - 1):
        ids = sequences[i]["input_ids"]
        digest.update(",".join(str(int(token)) for token in ids).encode())
    return f"{number} sequences, {digest.hexdigest()[:16]}"


def claim(
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool,
    sequences: int,
    marks: Mapping[str, str | None],
) -> None:
    """Take the output directory for this recipe.

    Args:
        sequences: of an optimiser step, over all processes. marks: text_mark by what it is of: "text", which
            trains, "held_out", and "text of STAGE" and "held_out of STAGE" of a stage with its own.

    Raises:
        SaveError: it holds a run and resume is off. ValueOutOfRangeError: it holds a run of another recipe or of
            other text.
    """
    path = folder / RECIPE_FILE
    content = {
        "recipe": recipe.to_dict(),
        "sequences_per_step": sequences,
        **marks,
    }
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".new")
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return
    if not resume:
        raise SaveError(
            f"training: {folder} holds a run already; go on with it (--resume), or choose another directory"
        )
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        # Keys that its version of the package did not have yet take their defaults.
        started = Recipe.from_dict(before["recipe"]).to_dict()
        old = _deciding({**before, "recipe": started})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueOutOfRangeError(
            f"training: {path} is no recipe of a run ({error!r}); choose another directory"
        ) from error
    new = _deciding(content)
    changed = sorted(key for key in old | new if old.get(key) != new.get(key))
    if changed:
        told = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise ValueOutOfRangeError(
            f"training: {folder} was started with another recipe or text: {told}; resume with those, or choose "
            "another directory"
        )


def _deciding(content: dict[str, Any]) -> dict[str, Any]:
    """What decides the course of a run, flat; of a run's recipe file or one to come."""
    recipe = content["recipe"]
    steered = any(stage["target_layers_skipped"] is not None for stage in recipe["stages"])
    free = (*_FREE, *(() if steered else _WATCHING), "data", "batch_size", "gradient_accumulation")
    kept = {key: value for key, value in recipe.items() if key not in free}
    kept["stages"] = [{**stage, "data": _cut(stage["data"])} for stage in recipe["stages"]]
    data = {f"data.{key}": value for key, value in (_cut(recipe["data"]) or {}).items()}
    told = {"sequences a step": content["sequences_per_step"], "text": content["text"]}
    told |= {key: mark for key, mark in content.items() if key.startswith("text of ")}
    if steered:
        told |= {key: mark for key, mark in content.items() if key.startswith("held_out")}
    return {**kept, **data, **told}


def _cut(data: dict[str, Any] | None) -> dict[str, Any] | None:
    """How text is cut, without its place."""
    return data and {key: value for key, value in data.items() if key not in _FREE_DATA}
