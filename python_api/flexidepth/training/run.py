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
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoints import save_routing
from ..checkpoints.trainable import load_routing
from ..errors import FlexiDepthError
from ..modeling import FlexiDepthForCausalLM
from .adapter_start import fit_adapters
from .claim import claim, text_mark
from .objective import Weights
from .ordering import order_layers
from .plot import write_training_figure
from .recipe import Recipe, Stage
from .start import (
    check_stages,
    half_precision,
    loading_advice,
    make_controller,
    memory_advice,
    starting_model,
    stored_fingerprint,
    training_advice,
)
from .trainer import RoutingTrainer, SaveRouting, last_checkpoint

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
    a run goes on with `resume`. Started by `accelerate launch`, every process calls this.

    Raises:
        SaveError: `output_dir` holds a run and resume is off. ValueOutOfRangeError: it holds one of another
            recipe or text, or a stage is not for this model. OutOfMemoryError: with the settings to lower.
    """
    from accelerate import PartialState

    folder = Path(output_dir)
    # Told of the CPU, or several processes on CPUs would each take themselves for the only one.
    processes = PartialState(cpu=not torch.cuda.is_available())
    with processes.main_process_first():
        if processes.is_main_process:
            sequences = recipe.batch_size * recipe.gradient_accumulation * processes.num_processes
            claim(
                folder,
                recipe,
                resume=resume,
                sequences=sequences,
                text=text_mark(data.train),
                held_out=None if data.held_out is None else text_mark(data.held_out),
            )
    with memory_advice(loading_advice(recipe)):
        model = starting_model(recipe)
    check_stages(recipe, model)
    fingerprint = stored_fingerprint(recipe)

    def save(network: FlexiDepthForCausalLM, path: Path) -> None:
        # In full precision: training goes on from it.
        save_routing(
            network,
            path,
            base_model=recipe.base_model,
            dtype=torch.float32,
            fingerprint=fingerprint,
        )

    result = folder
    for stage in recipe.stages:
        result = folder / stage.name / RESULT_FOLDER
        processes.wait_for_everyone()
        if result.is_dir():
            load_routing(model, result)
            continue
        with memory_advice(training_advice(recipe)):
            _run_stage(recipe, stage, folder / stage.name, model, data, save)
    processes.wait_for_everyone()
    return result


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    model: FlexiDepthForCausalLM,
    data: TrainingData,
    save: SaveRouting,
) -> None:
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
    if checkpoint is not None and _step(checkpoint) >= arguments.max_steps:
        # Killed between the last step and the end: there is nothing left to train.
        load_routing(model, checkpoint)
        trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    else:
        if checkpoint is None:
            _prepare(recipe, stage, model, data)
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


def _prepare(
    recipe: Recipe, stage: Stage, model: FlexiDepthForCausalLM, data: TrainingData
) -> None:
    """What a stage does before its first step, on the first sequences of the data, the same in every process."""
    size, held = recipe.batch_size, len(data.train)  # type: ignore[arg-type]

    def batch(first: int) -> dict[str, Tensor]:
        return data.collate([data.train[i] for i in range(first, min(first + size, held))])

    if stage.fit_adapters:
        sequences = min(held, math.ceil(stage.fit_adapters / recipe.data.length))
        fit_adapters(model, lambda: map(batch, range(0, sequences, size)))
    if stage.order_layers:
        order_layers(model, batch(0), middle=recipe.gate_bias)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def training_arguments(
    recipe: Recipe, stage: Stage, folder: Path, *, evaluating: bool
) -> TrainingArguments:
    """transformers' arguments of a stage."""
    seed = recipe.seed if stage.seed is None else stage.seed
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
        "bf16": half_precision(recipe),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": recipe.logging_steps,
        "save_steps": recipe.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluating else "no",
        "eval_steps": recipe.eval_steps_of(stage),
        "seed": seed,
        "data_seed": seed,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": True,
        "report_to": "none",
    }
    arguments = TrainingArguments(**common, max_steps=1)
    sequences = recipe.batch_size * recipe.gradient_accumulation * arguments.world_size
    steps = max(1, math.ceil(stage.tokens / (sequences * recipe.data.length)))
    warmup = math.ceil(stage.warmup * steps)
    return TrainingArguments(**common, max_steps=steps, warmup_steps=warmup)
