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
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 7}),
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
    for force in ("all", "dense"):
        torch.testing.assert_close(
            model(ids, force_routing=force).logits, want, rtol=1e-5, atol=1e-6
        )
    # The router's own decisions are something else, or the test above would prove nothing.
    assert (model(ids).logits - want).abs().max() > 1e-3
    got = model.generate(
        ids, max_new_tokens=12, do_sample=False, force_routing="all", pad_token_id=0
    )
    assert torch.equal(got, base.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0))


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
    with pytest.raises(UnsupportedError, match="rope type 'yarn'"):
        FlexiDepthConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedError, match="'gelu'"):
        FlexiDepthConfig(hidden_act="gelu")
