"""`convert`: a base model becomes a FlexiDepth checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexidepth.checkpoints import convert, open_checkpoint
from flexidepth.errors import DtypeError
from flexidepth.modeling import FlexiDepthForCausalLM
from tests.checkpoints.tiny import TEMPLATE, base_model, state, write_gguf

ROUTING: dict[str, Any] = {
    "routing_layers": [1, 3],
    "router_reduction_factor": 8,
    "adapter_reduction_factor": 4,
    "router_order": "tanh_norm",
    "router_bias": True,
    "gate": "straight_through",
    "router_thresholds": [0.25, 0.75],
}


def test_a_directory_keeps_its_weights_and_gets_the_routing_asked_for(
    llama_dir: Path, tmp_path: Path
) -> None:
    out = convert(llama_dir, tmp_path / "out", routing=ROUTING, seed=5, dtype="f32")
    checkpoint = open_checkpoint(out)
    assert {key: getattr(checkpoint.config, key) for key in ROUTING} == ROUTING
    assert checkpoint.routers_trained is False
    tensors = dict(checkpoint.tensors())
    base = state(base_model())
    assert all(torch.equal(tensors[name], base[name]) for name in base)
    seeded = dict(open_checkpoint(llama_dir, routing=ROUTING, seed=5).tensors())
    assert all(torch.equal(tensors[name], seeded[name]) for name in seeded)


def test_a_gguf_file_comes_with_its_tokenizer(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", base_model())
    out = convert(file, tmp_path / "out")
    checkpoint = open_checkpoint(out)
    tensors = dict(checkpoint.tensors())
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.2.router.enc.weight"].dtype == torch.float32
    before, after = open_checkpoint(file).tokenizer(), checkpoint.tokenizer()
    text = "<|im_start|>hello 123<|im_end|>"
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert after.chat_template == TEMPLATE


def test_the_released_layout_holds_the_same_model(llama_dir: Path, tmp_path: Path) -> None:
    ours = open_checkpoint(convert(llama_dir, tmp_path / "ours", dtype=torch.float32))
    released = open_checkpoint(
        convert(llama_dir, tmp_path / "released", dtype=torch.float32, layout="ddllama")
    )
    assert released.routers_trained is ours.routers_trained is False
    ids = torch.randint(0, 320, (1, 9))
    logits = []
    for checkpoint in (ours, released):
        model = FlexiDepthForCausalLM(checkpoint.config).eval()
        model.load_state_dict(dict(checkpoint.tensors()))
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_transformers_loads_what_is_written(llama_dir: Path, tmp_path: Path) -> None:
    out = convert(llama_dir, tmp_path / "out", routing=ROUTING, dtype="f32")
    model = FlexiDepthForCausalLM.from_pretrained(out)
    expected = dict(open_checkpoint(out).tensors())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_trained_routers_survive_another_conversion(llama_dir: Path, tmp_path: Path) -> None:
    first = convert(llama_dir, tmp_path / "first", routing=ROUTING, seed=1, dtype="f32")
    second = convert(first, tmp_path / "second", seed=2, dtype="f32")
    before, after = dict(open_checkpoint(first).tensors()), dict(open_checkpoint(second).tensors())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unknown_dtype_is_named(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DtypeError, match="dtype is 'int4'; wanted one of bf16"):
        convert(llama_dir, tmp_path / "out", dtype="int4")
