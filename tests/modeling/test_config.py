"""Configuration: there and back through transformers, changed afterwards, and refused when wrong."""

from __future__ import annotations

import math

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config

import flexidepth.modeling  # noqa: F401  (registers with the Auto classes)
from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import UnsupportedError, ValueOutOfRangeError
from flexidepth.rope_parameters import complete_rope_parameters

from ..engine.conftest import tiny_config

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPE = {"rope_theta": 5e5, **SCALING}


def test_saved_and_read_through_the_auto_class(tmp_path):
    config = tiny_config(
        rope_parameters=ROPE, router_thresholds=0.25, gate="straight_through", eos_token_id=[2, 3]
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, FlexiDepthConfig)
    assert (again.rope_parameters, again.rope_theta, again.rope_scaling) == (ROPE, 5e5, SCALING)
    assert again.router_thresholds == [0.25] * 3
    assert (again.gate, again.eos_token_id) == ("straight_through", [2, 3])
    assert FlexiDepthConfig.from_dict(again.to_dict()).to_dict() == again.to_dict()


@pytest.mark.parametrize(
    "form",
    [
        {"rope_parameters": ROPE},
        {"rope_theta": 5e5, "rope_scaling": SCALING},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
    ],
)
def test_rope_in_the_words_of_every_transformers(form):
    assert tiny_config(**form).rope_parameters == ROPE


def test_no_scaling_has_no_rope_scaling():
    config = tiny_config(rope_theta=1234.0)
    assert (config.rope_theta, config.rope_scaling) == (1234.0, None)
    config.rope_theta = 99.0
    config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    assert config.rope_parameters == {"rope_theta": 99.0, "rope_type": "linear", "factor": 2.0}


def test_changes_while_loading_and_after(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, router_thresholds=0.7, rope_theta=77.0)
    assert (config.router_thresholds, config.rope_theta) == ([0.7] * 3, 77.0)
    config.router_thresholds = 0.9
    assert config.router_thresholds == [0.9] * 3
    config.routing_layers = [0, 3]
    with pytest.raises(ValueOutOfRangeError, match="3 values; this model routes 2"):
        config.check()


def test_default_is_the_last_half():
    config = tiny_config(num_hidden_layers=5, routing_layers=None)
    assert config.routing_layers == [2, 3, 4] and config.router_thresholds == [0.5] * 3
    assert tiny_config(routing_layers=[]).num_routed_layers == 0
    assert tiny_config(routing_layers=(3, 1)).routing_layers == [1, 3]
    assert (tiny_config().router_dim, tiny_config().adapter_dim) == (12, 28)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_thresholds": [0.5, 1.5, 0.5]}, r"value 1 \(layer 2\) is 1.5"),
        ({"router_thresholds": [0.5, 0.5, "1"]}, r"value 2 \(layer 3\) is '1'"),
        ({"router_thresholds": True}, "is True"),
        ({"router_thresholds": [0.5]}, "1 values; this model routes 3"),
        ({"router_thresholds": math.nan}, r"value 0 .* is nan"),
        ({"routing_layers": [1, 4]}, r"wanted different layers of 0\.\.3"),
        ({"routing_layers": [1, 1, 2]}, "different layers"),
        ({"routing_layers": [1.7]}, "is 1.7; wanted a whole number"),
        ({"routing_layers": [-1]}, "is -1; wanted a whole number from 0"),
        ({"gate": "multiplyer"}, "did you mean 'multiplier'"),
        ({"router_order": "tanh"}, "wanted one of norm_tanh, tanh_norm"),
        ({"router_reduction_factor": 100}, "wanted 1 to 48"),
        ({"router_reduction_factor": 1.5}, "is 1.5; wanted 1 to 48"),
        ({"adapter_reduction_factor": 0}, "wanted 1 to 112"),
        ({"num_key_value_heads": 4}, "must be a multiple"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"head_dim": 15}, "needs an even one"),
        ({"router_threshold": 0.7}, "did you mean 'router_thresholds'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor is 0.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_parameters": {**ROPE, "high_freq_factor": 1.0}}, "more than low_freq_factor"),
    ],
)
def test_values_outside_their_range(changes, message):
    with pytest.raises(ValueOutOfRangeError, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_type": "gemma"}, "wanted one of llama, qwen2, mistral"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per kind of layer"),
    ],
)
def test_variants_that_are_not_implemented(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        tiny_config(**changes)


def test_complete_parameters_stay_as_they_are():
    assert complete_rope_parameters(ROPE) == ROPE
    assert complete_rope_parameters(None) == {"rope_theta": 10000.0, "rope_type": "default"}


def test_from_base_refuses_what_would_be_ignored():
    with pytest.raises(ValueOutOfRangeError, match=r"no routing argument 'gaet'.*mean 'gate'"):
        FlexiDepthConfig.from_base(LlamaConfig(), gaet="multiplier")


def test_qwen2_windows_by_layer():
    window = {"use_sliding_window": True, "sliding_window": 7, "num_hidden_layers": 4}
    none = FlexiDepthConfig.from_base(Qwen2Config(**window, max_window_layers=4))
    assert none.sliding_window is None
    assert (
        FlexiDepthConfig.from_base(Qwen2Config(**window, max_window_layers=0)).sliding_window == 7
    )
    with pytest.raises(UnsupportedError, match="some layers only"):
        FlexiDepthConfig.from_base(Qwen2Config(**window, max_window_layers=2))
