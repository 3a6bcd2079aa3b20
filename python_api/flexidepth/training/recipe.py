"""A training run as one configuration file: base model, routing, data, and stages one after the other."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..arguments import whole_number
from ..errors import ValueOutOfRangeError

_T = TypeVar("_T")


@dataclass(frozen=True)
class DataOptions:
    """Where text comes from and how it is cut.

    train, held_out: files or directories, see training.documents. length: tokens of a packed sequence.
    loss_on: "all" tokens, or the "answers" of chats only. skip_broken: pass over broken lines.
    num_proc: processes that tokenise; None = one a core.
    """

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    length: int = 2048
    loss_on: str = "all"
    skip_broken: bool = False
    num_proc: int | None = None


@dataclass(frozen=True)
class Stage:
    """One stretch of training with its own objective and learning-rate schedule.

    tokens: how many tokens to see. learning_rate: peak; warm-up over `warmup` of the steps, then cosine to
    `final_learning_rate` of the peak. router_learning_rate: peak for routers, None = the same. order_layers:
    start the routers' biases from what skipping each layer alone costs, see training.ordering. fit_adapters: tokens
    from which adapters are fitted in closed form before the first step, see training.adapter_start. lm, kl,
    skip_penalty, adapter: weights of the loss, see training.objective.Weights.
    target_layers_skipped: steers skip_penalty. budgets: trains at several targets at once instead, each
    sequence at one. exploration: share of running straight-through gates that are drawn to skip, to see what it
    costs; see layers._explore. seed: order of the text and what else is drawn, None = the recipe's; with another
    one a later stage does not see first what an earlier one saw first. data: text of its own, all of it said anew,
    None = the recipe's.
    """

    name: str
    tokens: int
    learning_rate: float = 1e-4
    router_learning_rate: float | None = None
    order_layers: bool = False
    fit_adapters: int = 0
    warmup: float = 0.03
    final_learning_rate: float = 0.0
    lm: float = 1.0
    kl: float = 0.0
    skip_penalty: float = 0.0
    adapter: float = 0.0
    target_layers_skipped: float | None = None
    budgets: list[float] | None = None
    exploration: float = 0.0
    seed: int | None = None
    data: DataOptions | None = None

    def __post_init__(self) -> None:
        _positive(self, "tokens", "learning_rate")
        if self.data is not None and not self.data.train:
            raise ValueOutOfRangeError(
                f"recipe: stage {self.name!r} has data without train; name its text, or leave data out for the "
                "recipe's"
            )
        if self.seed is not None:
            _seed(f"recipe: stage {self.name!r}: seed", self.seed)
        if self.router_learning_rate is not None:
            _positive(self, "router_learning_rate")
        _not_negative(self, "warmup", "final_learning_rate", "lm", "kl", "skip_penalty", "adapter")
        _not_negative(self, "fit_adapters")
        if not self.lm + self.kl + self.adapter > 0:
            raise ValueOutOfRangeError(
                f"recipe: stage {self.name!r} has the weights lm 0, kl 0, adapter 0; at least one must be above 0"
            )
        routed = self.lm or self.kl or self.skip_penalty or self.budgets or self.exploration
        if self.adapter and (routed or self.target_layers_skipped is not None):
            raise ValueOutOfRangeError(
                f"recipe: stage {self.name!r} has adapter {self.adapter}, which trains the adapters alone; set lm: 0.0 "
                "and leave kl, skip_penalty, budgets, target_layers_skipped and exploration out"
            )
        if not self.warmup < 1 or not 0 <= self.exploration < 1:
            raise ValueOutOfRangeError(
                f"recipe: stage {self.name!r} has warmup {self.warmup}, exploration {self.exploration}; both are "
                "shares, from 0 to below 1"
            )
        if self.budgets and self.target_layers_skipped is not None:
            raise ValueOutOfRangeError(
                f"recipe: stage {self.name!r} has both budgets and target_layers_skipped; choose one"
            )


# Optimiser steps between two looks at held-out text where a target is steered by what that skips, and looks in a
# short run.
MOST_STEERED_EVAL_STEPS = 25
FEWEST_STEERED_LOOKS = 6


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    base_model: name, directory or GGUF file. routing: routing arguments of FlexiDepthConfig. start: a routing
    checkpoint to go on from instead of seeded routers. gate_bias: start of the routers' bias, so high that
    every token runs nearly every layer. estimator: of the multipliers' gradient, "exact" along the path taken, or
    "sparsemixer", which draws decisions. batch_size: sequences per device and forward pass.
    gradient_accumulation: passes per optimiser step. eval_steps: optimiser steps between two looks at held-out text;
    at most MOST_STEERED_EVAL_STEPS count in a stage with target_layers_skipped, fewer in a short one. precision:
    "auto" (bfloat16 where a GPU or the processor's AMX has it), "bf16" or "float32".
    """

    base_model: str
    stages: list[Stage]
    data: DataOptions = field(default_factory=DataOptions)
    routing: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    gate_bias: float = 2.0
    estimator: str = "exact"
    seed: int = 0
    batch_size: int = 4
    gradient_accumulation: int = 8
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int = 100
    eval_steps: int = 100
    eval_sequences: int = 16

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueOutOfRangeError("recipe: no stages; give at least one")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueOutOfRangeError(
                f"recipe: stages {', '.join(names)}; their names must differ, a folder each is named by them"
            )
        if self.precision not in ("auto", "bf16", "float32"):
            raise ValueOutOfRangeError(
                f"recipe: precision is {self.precision!r}; wanted auto, bf16 or float32"
            )
        if self.estimator not in ("exact", "sparsemixer"):
            raise ValueOutOfRangeError(
                f"recipe: estimator is {self.estimator!r}; wanted exact or sparsemixer"
            )
        _positive(self, "batch_size", "gradient_accumulation", "logging_steps", "save_steps")
        _positive(self, "eval_steps", "eval_sequences", "max_grad_norm")
        _seed("recipe: seed", self.seed)

    def data_of(self, stage: Stage) -> DataOptions:
        """Where a stage's text comes from and how it is cut."""
        return self.data if stage.data is None else stage.data

    def eval_steps_of(self, stage: Stage) -> int:
        """Optimiser steps between two looks at held-out text in a stage."""
        if stage.target_layers_skipped is None:
            return self.eval_steps
        sequences = self.batch_size * self.gradient_accumulation
        steps = stage.tokens / (sequences * self.data_of(stage).length)
        most = max(1, int(steps / FEWEST_STEERED_LOOKS))
        return min(self.eval_steps, MOST_STEERED_EVAL_STEPS, most)

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """The recipe in a YAML file; relative paths in it count from the file's own folder.

        Raises:
            ValueOutOfRangeError: not YAML, unknown or missing keys, values outside their range.
        """
        import yaml

        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueOutOfRangeError(f"{path}: not YAML: {error}") from error
        recipe = cls.from_dict(content, where=str(path))
        return recipe.relative_to(path.parent)

    @classmethod
    def from_dict(cls, content: Any, *, where: str = "recipe") -> Recipe:
        """A recipe out of plain values, as they stand in a YAML file."""
        values = dict(_mapping(content, where))
        stages = values.pop("stages", [])
        if not isinstance(stages, list):
            raise ValueOutOfRangeError(f"{where}: stages must be a list, it is {stages!r}")
        data = values.pop("data", {})
        made = {
            "stages": [_make_stage(stage, f"{where}: stage {i}") for i, stage in enumerate(stages)],
            "data": _make(DataOptions, data, f"{where}: data"),
        }
        return _make(cls, {**values, **made}, where)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as from_dict takes them."""
        return dataclasses.asdict(self)

    def relative_to(self, folder: Path) -> Recipe:
        """The recipe with its data paths, and a start that lies there, taken from `folder`."""

        def placed(data: DataOptions) -> DataOptions:
            train, held_out = (
                [str(folder / source) for source in sources]
                for sources in (data.train, data.held_out)
            )
            return dataclasses.replace(data, train=train, held_out=held_out)

        stages = [
            stage if stage.data is None else dataclasses.replace(stage, data=placed(stage.data))
            for stage in self.stages
        ]
        start = self.start
        if start is not None and (folder / start).exists():  # else the name of a model
            start = str(folder / start)
        return dataclasses.replace(self, data=placed(self.data), stages=stages, start=start)


def _make_stage(content: Any, where: str) -> Stage:
    values = dict(_mapping(content, where))
    if values.get("data") is not None:
        values["data"] = _make(DataOptions, values["data"], f"{where}: data")
    return _make(Stage, values, where)


def _make(kind: type[_T], content: Any, where: str) -> _T:
    values = _mapping(content, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(fields)}"
            raise ValueOutOfRangeError(f"{where}: no key {name!r}; {hint}")
    absent = dataclasses.MISSING
    missing = [
        name
        for name, item in fields.items()
        if name not in values and item.default is absent and item.default_factory is absent
    ]
    if missing:
        raise ValueOutOfRangeError(f"{where}: without {', '.join(missing)}")
    for name, value in values.items():
        _check_type(where, name, value, str(fields[name].type))
    return kind(**values)


def _seed(name: str, value: int) -> None:
    whole_number(name, value, 0, (1 << 32) - 1)  # what numpy's generator takes


def _check_type(where: str, name: str, value: Any, wanted: str) -> None:
    """YAML reads 1e-4 as text (it wants 1.0e-4), and a typo makes any number a string."""
    plain = wanted.removesuffix(" | None")
    if value is None and plain != wanted:
        return
    allowed: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "str": (str,),
        "bool": (bool,),
    }
    kinds = allowed.get(plain)
    wrong_bool = isinstance(value, bool) and plain in ("int", "float")
    if kinds and (wrong_bool or not isinstance(value, kinds)):
        hint = (
            " (YAML wants a point in it: 1.0e-4)"
            if plain == "float" and isinstance(value, str)
            else ""
        )
        raise ValueOutOfRangeError(f"{where}: {name} is {value!r}; wanted {wanted}{hint}")
    if plain.startswith("list") and not isinstance(value, list):
        raise ValueOutOfRangeError(f"{where}: {name} is {value!r}; wanted a list")


def _mapping(content: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueOutOfRangeError(f"{where}: wanted keys and values, it is {content!r}")
    return content


def _positive(owner: object, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) > 0:
            raise ValueOutOfRangeError(
                f"recipe: {name} is {getattr(owner, name)}; wanted a number above 0"
            )


def _not_negative(owner: object, *names: str) -> None:
    for name in names:
        if not getattr(owner, name) >= 0:
            raise ValueOutOfRangeError(
                f"recipe: {name} is {getattr(owner, name)}; wanted a number from 0 on"
            )
