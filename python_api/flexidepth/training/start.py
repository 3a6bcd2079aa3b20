"""What a run starts from: the frozen base model with its routers and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flexidepth_ext.cpu_info import cpu_flags

from ..checkpoints import load_trainable, open_checkpoint
from ..checkpoints.fingerprint import base_fingerprint
from ..checkpoints.routing_directory import is_routing_directory
from ..config import has_adapter
from ..errors import OutOfMemoryError, UnsupportedError, ValueOutOfRangeError
from ..modeling import FlexiDepthForCausalLM
from .recipe import Recipe, Stage
from .steering import BudgetController, PenaltyController

_AMX = "amx_bf16"  # the processor's matrix unit
_CPU_OUT_OF_MEMORY = "can't allocate memory"  # what torch's allocator says, in a plain RuntimeError


def half_precision(recipe: Recipe) -> bool:
    """Whether the base model is kept, and matrices are multiplied, in bfloat16.

    By itself only where that is several times as fast: on GPUs, and on processors with AMX.
    """
    if recipe.precision == "auto":
        if torch.cuda.is_available():
            return bool(torch.cuda.is_bf16_supported())
        return _AMX in cpu_flags()
    return recipe.precision == "bf16"


def starting_model(recipe: Recipe) -> FlexiDepthForCausalLM:
    """The base model, frozen, with the routers and adapters that training starts from, in float32.

    Raises:
        CheckpointError: a start that was trained on another base model.
    """
    dtype = torch.bfloat16 if half_precision(recipe) else torch.float32
    precision = {"dtype": dtype, "routing_dtype": torch.float32}
    if recipe.start is not None:
        # The hash in a routing checkpoint is compared with that of the recipe's base model.
        apart = is_routing_directory(Path(recipe.start))
        own: dict[str, Any] = {"base_model": recipe.base_model} if apart else {}
        model = load_trainable(recipe.start, **precision, **own)
        # Of routers that are about to change.
        model.config.calibration, model.config.skip_presets = [], {}
    else:
        routing = {"router_bias": True, **recipe.routing}
        model = load_trainable(recipe.base_model, **precision, routing=routing, seed=recipe.seed)
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


def stored_fingerprint(recipe: Recipe) -> str:
    """base_fingerprint of the base model as it is stored, whatever precision it trains in."""
    base = open_checkpoint(recipe.base_model, seed=0)
    return base_fingerprint(base.config.num_hidden_layers, base.read_stored)


def make_controller(stage: Stage, num_routed: int) -> PenaltyController | BudgetController | None:
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


def check_stages(recipe: Recipe, model: FlexiDepthForCausalLM) -> None:
    """Raise for a stage that this model cannot do, before any of them has run."""
    config = model.config
    for stage in recipe.stages:
        make_controller(stage, config.num_routed_layers)
        model.explore_skips(stage.exploration)
        if (stage.adapter or stage.fit_adapters) and not has_adapter(config.ablations):
            raise ValueOutOfRangeError(
                f"training: stage {stage.name!r} trains adapters, and a model with the ablations "
                f"{', '.join(config.ablations)} has none; leave the stage out"
            )
        if stage.order_layers and not config.router_bias:
            raise UnsupportedError(
                f"training: stage {stage.name!r} has order_layers, which sets the routers' biases, and these have "
                "none; set router_bias: true in the recipe's routing"
            )
    model.explore_skips(0.0)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Errors within it that are for want of memory become OutOfMemoryErrors that say what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and _CPU_OUT_OF_MEMORY not in str(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OutOfMemoryError(f"training: out of memory ({first}); {advice}") from error


def loading_advice(recipe: Recipe) -> str:
    """What to do where the model does not fit."""
    return (
        f"{recipe.base_model} is held as it is while it trains: free memory, or keep it in half the size with "
        f"precision: bf16 (it is {recipe.precision})"
    )


def training_advice(recipe: Recipe) -> str:
    """What to do where its batches do not fit."""
    return (
        f"lower batch_size ({recipe.batch_size}) and raise gradient_accumulation ({recipe.gradient_accumulation}) "
        f"for it, lower data.length ({recipe.data.length}), or set gradient_checkpointing: true"
    )
