"""A run does not start from routers of another base model, and what it saves tells its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from flexidepth.checkpoints import load_trainable, open_checkpoint, save_routing
from flexidepth.checkpoints.checkpoint import expected_shapes
from flexidepth.checkpoints.fingerprint import base_signature, signature_distance
from flexidepth.errors import CheckpointError
from flexidepth.training.packing import collate
from flexidepth.training.run import TrainingData, run_recipe
from flexidepth.training.start import starting_model
from tests.checkpoints.tiny import save_base
from tests.training.runs import ADAPTERS, Sequences, recipe

STAGE = {**ADAPTERS, "tokens": 128}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    return tmp_path / "base"


def test_a_start_on_other_weights_of_the_same_norms_is_refused(base: Path, tmp_path: Path) -> None:
    start = save_routing(load_trainable(base), tmp_path / "start", base_model=base)
    other = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "_proj" in name:
                parameter.normal_(std=0.1)
    other.save_pretrained(tmp_path / "other")
    assert starting_model(recipe(base, STAGE, start=str(start))).config.routing_layers
    with pytest.raises(CheckpointError, match="trained on another base model"):
        starting_model(recipe(tmp_path / "other", STAGE, start=str(start)))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_what_a_run_saves_has_the_signature_of_its_base(
    base: Path, tmp_path: Path, precision: str
) -> None:
    data = TrainingData(Sequences(64, 1), None, lambda items: collate(items, document_ids=True))
    result = run_recipe(recipe(base, STAGE, precision=precision), tmp_path / "run", data)
    checkpoint = open_checkpoint(base)
    shapes = expected_shapes(checkpoint.config, routing=False)
    stored = base_signature(shapes, checkpoint.read_stored)
    saved = json.loads((result / "config.json").read_text())["base_signature"]
    assert signature_distance(shapes, stored, saved)[0] < 0.01
    assert open_checkpoint(result).routers_trained
