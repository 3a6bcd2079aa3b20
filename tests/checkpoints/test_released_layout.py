"""The released checkpoint's names and keys (`ddllama`), in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexidepth.checkpoints import open_checkpoint, save_checkpoint
from flexidepth.checkpoints.checkpoint import expected_shapes
from flexidepth.checkpoints.names import from_released, to_released
from flexidepth.errors import CheckpointError, UnsupportedError, ValueOutOfRangeError
from tests.checkpoints.tiny import SIZES, base_model

# As published: key -> (our name, shape) for d 64, ffn 128, both reduction factors 16. The adapter's
# down_proj makes the product's other half and its up_proj the output.
RELEASED = {
    "router.router_enc.weight": ("router.enc.weight", (4, 64)),
    "router.router_norm.weight": ("router.norm.weight", (4,)),
    "router.router_dec.weight": ("router.dec.weight", (64, 4)),
    "router.router_head.weight": ("router.head.weight", (1, 64)),
    "router_proj.gate_proj.weight": ("adapter.gate_proj.weight", (8, 64)),
    "router_proj.down_proj.weight": ("adapter.up_proj.weight", (8, 64)),
    "router_proj.up_proj.weight": ("adapter.down_proj.weight", (64, 8)),
}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A directory in the released layout, with a config.json in the words of transformers 4."""
    folder = tmp_path / "released"
    folder.mkdir()
    tensors = {name: tensor.clone() for name, tensor in base_model().state_dict().items()}
    for layer in (2, 3):
        for key, (_, shape) in RELEASED.items():
            tensors[f"model.layers.{layer}.{key}"] = torch.randn(shape)
    save_file(tensors, folder / "model.safetensors")
    config = {
        **SIZES,
        "model_type": "ddllama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "routing_layers": [2, 3],
        "router_reduction_factor": 16,
        "proj_reduction_factor": 16,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("key", RELEASED)
def test_names_map_both_ways(key: str) -> None:
    ours = f"model.layers.11.{RELEASED[key][0]}"
    assert from_released(f"model.layers.11.{key}") == ours
    assert to_released(ours) == f"model.layers.11.{key}"


def test_names_of_the_base_model_stay() -> None:
    for name in ("model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert from_released(name) == to_released(name) == name


def test_a_released_checkpoint_opens(released: Path) -> None:
    checkpoint = open_checkpoint(released)
    config = checkpoint.config
    assert checkpoint.routers_trained
    assert (config.routing_layers, config.router_order, config.gate) == (
        [2, 3],
        "norm_tanh",
        "multiplier",
    )
    assert config.router_thresholds == [0.5, 0.5]
    assert config.rope_parameters["rope_theta"] == 500000.0
    stored, tensors = load_file(released / "model.safetensors"), dict(checkpoint.tensors())
    for key, (ours, _) in RELEASED.items():
        assert torch.equal(tensors[f"model.layers.3.{ours}"], stored[f"model.layers.3.{key}"])
    assert list(tensors) == list(expected_shapes(config))


def test_it_survives_a_round_trip_in_its_own_layout(released: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(released)
    out = save_checkpoint(
        checkpoint.config, checkpoint.tensors(), tmp_path / "out", layout="ddllama"
    )
    before, after = load_file(released / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((d / "config.json").read_text()) for d in (released, out))
    assert {key: new[key] for key in old} == old
    assert new["rope_scaling"] is None
    ours = {
        "gate",
        "router_order",
        "router_thresholds",
        "base_model_type",
        "qkv_bias",
        "rope_parameters",
    }
    assert not ours & new.keys()
    assert open_checkpoint(out).config.to_dict() == checkpoint.config.to_dict()


def test_llama3_rope_scaling_is_written_in_the_words_of_transformers_4(
    tmp_path: Path, released: Path
) -> None:
    path = released / "config.json"
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": scaling}))
    checkpoint = open_checkpoint(released)
    assert checkpoint.config.rope_parameters == {**scaling, "rope_theta": 500000.0}
    out = save_checkpoint(
        checkpoint.config, checkpoint.tensors(), tmp_path / "out", layout="ddllama"
    )
    assert json.loads((out / "config.json").read_text())["rope_scaling"] == scaling


def test_both_router_orders_and_thresholds_can_be_asked_for(released: Path) -> None:
    routing = {"router_order": "tanh_norm", "router_thresholds": [0.3, 0.7]}
    config = open_checkpoint(released, routing=routing).config
    assert (config.router_order, config.router_thresholds) == ("tanh_norm", [0.3, 0.7])


@pytest.mark.parametrize(
    "routing",
    [{"routing_layers": [1, 2, 3]}, {"router_reduction_factor": 8}, {"router_bias": True}],
)
def test_trained_routers_cannot_be_reshaped(released: Path, routing: dict[str, Any]) -> None:
    with pytest.raises(ValueOutOfRangeError, match="whose routers were made with"):
        open_checkpoint(released, routing=routing)


def test_routing_that_agrees_with_the_stored_is_accepted(released: Path) -> None:
    assert open_checkpoint(released, routing={"routing_layers": [3, 2]}).routers_trained


def test_a_config_without_routing_layers(released: Path) -> None:
    path = released / "config.json"
    content = json.loads(path.read_text())
    del content["routing_layers"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no routing_layers"):
        open_checkpoint(released)


def test_adapter_biases_are_refused(released: Path) -> None:
    path = released / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mlp_bias": True}))
    with pytest.raises(UnsupportedError, match="mlp_bias"):
        open_checkpoint(released)


@pytest.mark.parametrize(
    "routing",
    [{"gate": "straight_through"}, {"router_order": "tanh_norm"}, {"router_thresholds": 0.4}],
)
def test_what_the_released_code_would_run_differently_is_not_written(
    released: Path, tmp_path: Path, routing: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint(released, routing=routing)
    with pytest.raises(ValueOutOfRangeError, match=next(iter(routing))):
        save_checkpoint(checkpoint.config, checkpoint.tensors(), tmp_path / "out", layout="ddllama")
    assert not (tmp_path / "out").exists()
