"""Carrying out a recipe: stages one after the other, each resumable at its last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ..checkpoints import load_trainable, save_routing
from ..checkpoints.trainable import load_routing
from ..config import has_adapter
from ..errors import FlexiDepthError, OutOfMemoryError, SaveError, ValueOutOfRangeError
from ..modeling import FlexiDepthForCausalLM
from .objective import Weights
from .ordering import order_layers
from .plot import write_training_figure
from .recipe import Recipe, Stage
from .steering import BudgetController, PenaltyController
from .trainer import Controller, RoutingTrainer, last_checkpoint

RECIPE_FILE = "recipe.json"
LOG_FILE = "log.json"
LOG_FORMAT = "flexidepth-training 1"
FIGURE_FILE = "curves.svg"
RESULT_FOLDER = "routing"


@dataclass(frozen=True)
class TrainingData:
    """Packed sequences, see training.packing, and how they become a batch."""

    train: Dataset[dict[str, Tensor]]
    held_out: Dataset[dict[str, Tensor]] | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]


def run_recipe(
    recipe: Recipe, output_dir: Path | str, data: TrainingData, *, resume: bool = False
) -> Path:
    """Train, and return the directory of the finished routing checkpoint.

    Each stage has a folder STAGE under `output_dir`, with checkpoints of the Trainer while it runs and the
    routing checkpoint STAGE/routing when it has ended, from which the next one starts. Killed at any moment,
    a run goes on with `resume`.

    Raises:
        SaveError: `output_dir` holds a run and resume is off. ValueOutOfRangeError: it holds one of another
            recipe. OutOfMemoryError: with the settings to lower.
    """
    folder = Path(output_dir)
    _claim(folder, recipe, resume)
    model = starting_model(recipe)
    result = folder
    for stage in recipe.stages:
        result = folder / stage.name / RESULT_FOLDER
        if result.is_dir():
            load_routing(model, result)
            continue
        try:
            _run_stage(recipe, stage, folder / stage.name, model, data)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(recipe, error) from error
    return result


def starting_model(recipe: Recipe) -> FlexiDepthForCausalLM:
    """The base model, frozen, with the routers and adapters that training starts from."""
    on_gpu = torch.cuda.is_available()
    base_dtype = torch.bfloat16 if on_gpu and recipe.precision != "float32" else torch.float32
    if recipe.start is not None:
        model = load_trainable(recipe.start, dtype=base_dtype, routing_dtype=torch.float32)
        # Of routers that are about to change.
        model.config.calibration, model.config.skip_presets = [], {}
    else:
        model = load_trainable(
            recipe.base_model,
            dtype=base_dtype,
            routing_dtype=torch.float32,
            routing={"router_bias": True, **recipe.routing},
            seed=recipe.seed,
        )
    model.freeze_base()
    model.sample_gates(recipe.estimator == "sparsemixer")
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.start is None:
        with torch.no_grad():
            for layer in model.routed_layers():
                if layer.router.head.bias is not None:
                    layer.router.head.bias.fill_(recipe.gate_bias)
    return model


def make_controller(stage: Stage, num_routed: int) -> Controller | None:
    """What a stage steers."""
    if stage.budgets:
        return BudgetController(stage.budgets, num_routed)
    if stage.target_layers_skipped is not None:
        if not 0 < stage.target_layers_skipped < num_routed:
            raise ValueOutOfRangeError(
                f"training: target_layers_skipped is {stage.target_layers_skipped}; wanted a number between 0 "
                f"and {num_routed}, the number of routed layers"
            )
        return PenaltyController(stage.skip_penalty or 1e-4, stage.target_layers_skipped)
    return None


def _run_stage(
    recipe: Recipe, stage: Stage, folder: Path, model: FlexiDepthForCausalLM, data: TrainingData
) -> None:
    if stage.adapter and not has_adapter(model.config.ablations):
        raise ValueOutOfRangeError(
            f"training: stage {stage.name!r} trains adapters, and a model with the ablations "
            f"{', '.join(model.config.ablations)} has none; leave the stage out"
        )

    def save(network: FlexiDepthForCausalLM, path: Path) -> None:
        # In full precision: training goes on from it.
        save_routing(network, path, base_model=recipe.base_model, dtype=torch.float32)

    arguments = training_arguments(recipe, stage, folder, evaluating=data.held_out is not None)
    trainer = RoutingTrainer(
        model,
        arguments,
        weights=Weights(stage.lm, stage.kl, stage.skip_penalty, stage.adapter),
        controller=make_controller(stage, model.config.num_routed_layers),
        router_learning_rate=stage.router_learning_rate,
        save=save,
        load=load_routing,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=data.collate,
    )
    model.explore_skips(stage.exploration)
    checkpoint = last_checkpoint(folder)
    if stage.order_layers and checkpoint is None:
        items = [data.train[i] for i in range(recipe.batch_size)]
        order_layers(model, data.collate(items), middle=recipe.gate_bias)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not trainer.is_world_process_zero():
        return
    log = {
        "format": LOG_FORMAT,
        "stage": dataclasses.asdict(stage),
        "recipe": recipe.to_dict(),
        "history": trainer.state.log_history,
    }
    (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n")
    with suppress(FlexiDepthError):  # without matplotlib the curves stay in the log
        write_training_figure(trainer.state.log_history, folder / FIGURE_FILE)
    save(model, folder / RESULT_FOLDER)


def training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, *, evaluating: bool
) -> TrainingArguments:
    """transformers' arguments of a stage."""
    on_gpu = torch.cuda.is_available()
    half = recipe.precision == "bf16" or (
        recipe.precision == "auto" and on_gpu and torch.cuda.is_bf16_supported()
    )
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": stage.final_learning_rate},
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "bf16": half,
        "use_cpu": not on_gpu,
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluating else "no",
        "eval_steps": recipe.eval_steps,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": True,
        "report_to": "none",
    }
    arguments = TrainingArguments(**common, max_steps=1)
    sequences = recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
    steps = max(1, math.ceil(stage.tokens / (sequences * recipe.data.length)))
    warmup = math.ceil(stage.warmup * steps)
    return TrainingArguments(**common, max_steps=steps, warmup_steps=warmup)


def _claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Take the output directory for this recipe."""
    path = folder / RECIPE_FILE
    content = json.dumps(recipe.to_dict(), indent=1) + "\n"
    if path.exists():
        if not resume:
            raise SaveError(
                f"training: {folder} holds a run already; go on with it (--resume), or choose another directory"
            )
        if path.read_text() != content:
            raise ValueOutOfRangeError(
                f"training: {folder} was started with another recipe, see {path}; resume with that one, or choose "
                "another directory"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _out_of_memory(recipe: Recipe, error: BaseException) -> OutOfMemoryError:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return OutOfMemoryError(
        f"training: out of memory ({first}); lower batch_size ({recipe.batch_size}) and raise "
        f"gradient_accumulation ({recipe.gradient_accumulation}) for it, lower data.length "
        f"({recipe.data.length}), or set gradient_checkpointing: true"
    )
