"""Carrying out a recipe: stages one after the other, each resumable at its last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
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
from .lock import run_lock
from .objective import Weights
from .ordering import order_layers
from .penalty_start import missed_target
from .plot import write_training_figure
from .processes import all_processes
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

Notify = Callable[[str], None]


@dataclass(frozen=True)
class TrainingData:
    """Packed sequences, see training.packing, and how they become a batch; by name, those of stages with their own."""

    train: Dataset[dict[str, Tensor]]
    held_out: Dataset[dict[str, Tensor]] | None
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]]
    stages: Mapping[str, TrainingData] = field(default_factory=dict)

    def of(self, stage: Stage) -> TrainingData:
        """What a stage sees."""
        return self.stages.get(stage.name, self)

    def marks(self) -> dict[str, str | None]:
        """text_mark of what trains and of what is held out, and of each stage's own."""
        held_out = None if self.held_out is None else text_mark(self.held_out)
        found: dict[str, str | None] = {"text": text_mark(self.train), "held_out": held_out}
        for name, own in self.stages.items():
            found |= {f"{kind} of {name}": mark for kind, mark in own.marks().items()}
        return found


def run_recipe(
    recipe: Recipe,
    output_dir: Path | str,
    data: TrainingData,
    *,
    resume: bool = False,
    notify: Notify | None = None,
) -> Path:
    """Train, and return the directory of the finished routing checkpoint.

    Each stage has a folder STAGE under `output_dir`, with checkpoints of the Trainer while it runs and the
    routing checkpoint STAGE/routing when it has ended, from which the next one starts. Killed at any moment,
    a run goes on with `resume`. Started by `accelerate launch`, every process calls this.

    Args:
        notify: takes a line about what the user should know, in the main process; None = warnings.

    Raises:
        SaveError: `output_dir` holds a run and resume is off, or another process is training there.
            ValueOutOfRangeError: it holds one of another recipe or text, or a stage is not for this model.
            OutOfMemoryError: with the settings to lower.
    """
    folder, main = Path(output_dir), all_processes().is_main_process
    with run_lock(folder) if main else nullcontext():
        return _run(recipe, folder, data, resume, notify or _warn)


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)


def _run(recipe: Recipe, folder: Path, data: TrainingData, resume: bool, notify: Notify) -> Path:
    processes = all_processes()
    with processes.main_process_first():
        if processes.is_main_process:
            sequences = recipe.batch_size * recipe.gradient_accumulation * processes.num_processes
            claim(
                folder,
                recipe,
                resume=resume,
                sequences=sequences,
                marks=data.marks(),
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
            history = _run_stage(recipe, stage, folder / stage.name, model, data.of(stage), save)
        missed = missed_target(stage, history)
        if missed is not None and processes.is_main_process:
            notify(missed)
    processes.wait_for_everyone()
    return result


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    model: FlexiDepthForCausalLM,
    data: TrainingData,
    save: SaveRouting,
) -> list[dict[str, Any]]:
    """Train a stage, write what it leaves, and return the Trainer's log."""
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
            _prepare(recipe, stage, trainer, data)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    history: list[dict[str, Any]] = trainer.state.log_history
    if trainer.is_world_process_zero():
        _write_log(recipe, stage, folder, history)
        save(model, folder / RESULT_FOLDER)
    return history


def _write_log(recipe: Recipe, stage: Stage, folder: Path, history: list[dict[str, Any]]) -> None:
    log = {
        "format": LOG_FORMAT,
        "stage": dataclasses.asdict(stage),
        "recipe": recipe.to_dict(),
        "history": history,
    }
    (folder / LOG_FILE).write_text(json.dumps(log, indent=1) + "\n")
    with suppress(FlexiDepthError):  # without matplotlib the curves stay in the log
        write_training_figure(history, folder / FIGURE_FILE)


def _prepare(recipe: Recipe, stage: Stage, trainer: RoutingTrainer, data: TrainingData) -> None:
    """What a stage does before its first step, on the first sequences of the data, the same in every process."""
    size, held = recipe.batch_size, len(data.train)  # type: ignore[arg-type]
    model = trainer.network

    def batch(first: int) -> dict[str, Tensor]:
        return data.collate([data.train[i] for i in range(first, min(first + size, held))])

    if stage.fit_adapters:
        sequences = min(held, math.ceil(stage.fit_adapters / recipe.data_of(stage).length))
        fit_adapters(model, lambda: map(batch, range(0, sequences, size)))
    if stage.order_layers:
        order_layers(model, batch(0), middle=recipe.gate_bias)
    trainer.start_penalty(batch(0))


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
    steps = max(1, math.ceil(stage.tokens / (sequences * recipe.data_of(stage).length)))
    warmup = math.ceil(stage.warmup * steps)
    return TrainingArguments(**common, max_steps=steps, warmup_steps=warmup)
