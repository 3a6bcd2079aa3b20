"""Every layer run with gate weight 1 is transformers' own model, for every supported architecture."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flexidepth.base_model import base_config_of
from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import UnsupportedError
from flexidepth.modeling import FlexiDepthForCausalLM

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied_biased": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama3_rope": (LlamaConfig, LlamaForCausalLM, {"rope_theta": 5e4, "rope_scaling": LLAMA3}),
    "linear_rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2_tied_window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 0,
        },
    ),
    "qwen2_window_in_no_layer": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 4},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
    "mistral_without_window": (
        MistralConfig,
        MistralForCausalLM,
        {"sliding_window": None, "num_key_value_heads": 4, "rope_theta": 1e6},
    ),
}


def base_model(name):
    config_class, model_class, extra = BASES[name]
    torch.manual_seed(3)
    model = model_class(config_class(**{**SIZES, **extra})).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_forced_all_equals_the_base_model(name):
    base = base_model(name)
    model = FlexiDepthForCausalLM.from_base_model(base)
    ids = torch.randint(0, 101, (2, 50))
    want = base(ids).logits
    for force in ("all", "dense", model.config.routing_layers):
        got = model(ids, force_routing=force).logits
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(got.argmax(-1), want.argmax(-1))
    # The router's own decisions are something else, or the test above would prove nothing.
    assert (model(ids).logits - want).abs().max() > 1e-3
    got = model.generate(
        ids, max_new_tokens=12, do_sample=False, force_routing="all", pad_token_id=0
    )
    assert torch.equal(got, base.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_left_padded_equals_the_base_model(name):
    base = base_model(name)
    model = FlexiDepthForCausalLM.from_base_model(base)
    ids = torch.randint(0, 101, (2, 30))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    want = base.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, force_routing="all", **settings), want
    )


@pytest.mark.parametrize("name", BASES)
def test_loss_and_gradients_equal_the_base_models(name):
    base = base_model(name).train()
    model = FlexiDepthForCausalLM.from_base_model(base).train()
    ids = torch.randint(0, 101, (2, 30))
    labels = ids.clone()
    labels[0, :10] = -100
    want = base(ids, labels=labels).loss
    got = model(ids, labels=labels, force_routing="all").loss
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    want.backward()
    got.backward()
    own = dict(model.named_parameters())
    for parameter_name, parameter in base.named_parameters():
        torch.testing.assert_close(
            own[parameter_name].grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=parameter_name
        )


@pytest.mark.parametrize("name", BASES)
def test_configuration_there_and_back(name):
    base = base_model(name).config
    config = FlexiDepthConfig.from_base(base)
    back = base_config_of(config)
    again = FlexiDepthConfig.from_base(back)
    assert again.to_dict() == config.to_dict()


def test_other_architectures_name_what_is_missing():
    with pytest.raises(
        UnsupportedError, match="'gemma' is not implemented; llama, qwen2, mistral are"
    ):
        FlexiDepthConfig.from_base(GemmaConfig())


def test_a_base_with_other_tensors_is_refused():
    base = base_model("llama")
    del base.model.layers[2].mlp.up_proj
    base.model.layers[0].mlp.extra = torch.nn.Linear(2, 2, bias=False)
    with pytest.raises(UnsupportedError, match=r"lacks .*layers\.2\.mlp\.up_proj.*mlp\.extra"):
        FlexiDepthForCausalLM.from_base_model(base)
    with pytest.raises(UnsupportedError, match="has no LM head"):
        FlexiDepthForCausalLM.from_base_model(base.model)
