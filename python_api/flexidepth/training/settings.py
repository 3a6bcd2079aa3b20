"""Single values of a recipe set by name: `batch_size=1`, `data.length=512`, `stages.budgets.tokens=40960`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ValueOutOfRangeError
from .recipe import Recipe

_WANTED = (
    "wanted KEY=VALUE, with KEY as batch_size, data.length, routing.gate or stages.NAME.tokens"
)


def with_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with values put in, each `KEY=VALUE` with the value in YAML.

    Raises:
        ValueOutOfRangeError: a setting of another form, a key or a stage that there is not, a value out of range.
    """
    import yaml

    values = recipe.to_dict()
    for setting in settings:
        key, equals, text = setting.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise ValueOutOfRangeError(f"training: setting {setting!r}; {_WANTED}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueOutOfRangeError(
                f"training: setting {setting!r}: not YAML: {error}"
            ) from error
        _place(values, path, value, setting)
    return Recipe.from_dict(values, where=f"recipe with {', '.join(settings)}")


def _place(values: dict[str, Any], path: list[str], value: Any, setting: str) -> None:
    owner: Any = values
    if path[0] == "stages" and len(path) == 3:
        found = [stage for stage in values["stages"] if stage["name"] == path[1]]
        if not found:
            names = ", ".join(stage["name"] for stage in values["stages"])
            raise ValueOutOfRangeError(
                f"training: setting {setting!r}: no stage {path[1]!r}; there are {names}"
            )
        owner = found[0]
    elif path[0] in ("data", "routing") and len(path) == 2:
        owner = values[path[0]]
    elif len(path) != 1 or path[0] in ("stages", "data", "routing"):
        raise ValueOutOfRangeError(f"training: setting {setting!r}; {_WANTED}")
    owner[path[-1]] = value
