"""Models that are saved, read back, resized and trained by transformers' own tools."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM

from flexidepth.modeling import FlexiDepthForCausalLM, FlexiDepthModel

from ..engine.conftest import tiny_config, tiny_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_and_read_through_the_auto_classes(tmp_path, ids, tied, dtype):
    config = tiny_config(
        router_bias=True, router_thresholds=[0.2, 0.4, 0.6], tie_word_embeddings=tied
    )
    model = tiny_model(config).to(dtype)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118  (not a dict)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["FlexiDepthForCausalLM"]
    assert written["model_type"] == "flexidepth"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(again, FlexiDepthForCausalLM) and again.dtype == dtype
    assert again.config.router_thresholds == [0.2, 0.4, 0.6]
    assert torch.equal(again(ids).logits, model(ids).logits)
    shared = again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert shared == tied
    inner = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert isinstance(inner, FlexiDepthModel)
    assert torch.equal(inner(ids).last_hidden_state, model.model(ids).last_hidden_state)


@torch.no_grad()
def test_routing_changed_while_loading(tmp_path, ids):
    tiny_model(tiny_config()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, router_thresholds=1.0)
    assert model.config.router_thresholds == [1.0] * 3 and not model(ids).run.any()
    with pytest.raises(ValueError, match="3 values; this model routes 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing_layers=[1, 2])


@torch.no_grad()
def test_in_shards(tmp_path, ids):
    model = tiny_model(tiny_config())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = FlexiDepthForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_resized_embeddings_stay_tied(ids):
    model = tiny_model(tiny_config())
    want = model(ids).logits
    model.resize_token_embeddings(220)
    got = model(ids).logits
    assert got.shape[-1] == 220 and model.config.vocab_size == 220
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(got[..., :211], want)
