"""Damaged and foreign directories: an error with the names and values, before any weight is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexidepth.checkpoints import open_checkpoint
from flexidepth.errors import CheckpointError, UnsupportedError, ValueOutOfRangeError
from tests.checkpoints.tiny import save_base


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_missing_and_unexpected_tensors_are_named(llama_dir: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.zeros(1)

    change_tensors(llama_dir, change)
    with pytest.raises(
        CheckpointError,
        match=r"1 tensors missing \(model.norm.weight\), 1 unexpected \(model.extra.weight",
    ):
        open_checkpoint(llama_dir)


def test_a_long_list_of_names_is_shortened(llama_dir: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name or ".layers.2." in name]:
            del tensors[name]

    change_tensors(llama_dir, change)
    with pytest.raises(
        CheckpointError, match=r"18 tensors missing \(.* and 8 more\), 0 unexpected \(none\)"
    ):
        open_checkpoint(llama_dir)


def test_wrong_shape_names_both_shapes(llama_dir: Path) -> None:
    change_tensors(llama_dir, lambda t: t.update({"model.norm.weight": torch.zeros(63)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is \[63\] instead of \[64\]"):
        open_checkpoint(llama_dir)


def test_wrong_type_is_named(llama_dir: Path) -> None:
    change_tensors(
        llama_dir, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    )
    with pytest.raises(CheckpointError, match=r"model.norm.weight is I8; F32, BF16, F16 are read"):
        open_checkpoint(llama_dir)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(llama_dir: Path, keep: int) -> None:
    path = llama_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        open_checkpoint(llama_dir)


def sharded(folder: Path) -> Path:
    save_base(folder, max_shard_size="100KB")
    return folder / "model.safetensors.index.json"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: missing, though the index lists it"):
        open_checkpoint(tmp_path)


def test_an_index_naming_the_wrong_shard(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    name = next(n for n, file in content["weight_map"].items() if file == shards[0])
    content["weight_map"][name] = shards[1]
    index.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=f"{name} is missing, though the index lists it there"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../model.safetensors"}])
def test_a_malformed_index(tmp_path: Path, weight_map: Any) -> None:
    index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"no weight_map|not a file of its own directory"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(llama_dir: Path) -> None:
    (llama_dir / "model.safetensors").rename(llama_dir / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin.*safetensors first"):
        open_checkpoint(llama_dir)


def test_no_weights_at_all(llama_dir: Path) -> None:
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(llama_dir)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "config.json: missing"),
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "lacks vocab_size"),
        ('{"model_type": "llama", "vocab_size": 5}', "lacks hidden_size, intermediate_size"),
    ],
)
def test_a_config_that_cannot_be_used(llama_dir: Path, text: str | None, reason: str) -> None:
    path = llama_dir / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(llama_dir)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; llama, qwen2, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "'yarn'"),
    ],
)
def test_an_unsupported_variant_says_what_is_missing(
    llama_dir: Path, changes: dict[str, Any], reason: str
) -> None:
    change_config(llama_dir, **changes)
    with pytest.raises(NotImplementedError, match=rf"config\.json: .*{reason}"):
        open_checkpoint(llama_dir)


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "64"}, {"num_key_value_heads": 3}, {"head_dim": 15}]
)
def test_malformed_values_name_the_file(llama_dir: Path, changes: dict[str, Any]) -> None:
    change_config(llama_dir, **changes)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        open_checkpoint(llama_dir)


def test_a_config_of_another_model(llama_dir: Path) -> None:
    change_config(llama_dir, intermediate_size=256)
    with pytest.raises(
        CheckpointError, match=r"mlp.gate_proj.weight is \[128, 64\] instead of \[256, 64\]"
    ):
        open_checkpoint(llama_dir)


def test_a_damaged_tokenizer(llama_dir: Path) -> None:
    (llama_dir / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(llama_dir)
    with pytest.raises(CheckpointError, match="the tokenizer cannot be read"):
        checkpoint.tokenizer()


def test_an_unknown_routing_argument_suggests_the_right_one(llama_dir: Path) -> None:
    with pytest.raises(ValueOutOfRangeError, match="did you mean 'router_thresholds'"):
        open_checkpoint(llama_dir, routing={"router_threshold": 0.3})


def test_routing_out_of_range(llama_dir: Path) -> None:
    with pytest.raises(ValueOutOfRangeError, match=r"routing_layers \[4\]"):
        open_checkpoint(llama_dir, routing={"routing_layers": [4]})
    with pytest.raises(ValueOutOfRangeError, match=r"1\.5"):
        open_checkpoint(llama_dir, routing={"router_thresholds": 1.5})
