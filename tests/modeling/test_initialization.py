"""Seeded routers and adapters: functions of name, shape and seed alone."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexidepth.initialization import initial_routing, initial_tensor, routing_shapes
from flexidepth.modeling import FlexiDepthForCausalLM

from ..engine.conftest import tiny_config


def test_covers_every_router_and_adapter_tensor_and_no_other():
    config = tiny_config(router_bias=True)
    model = FlexiDepthForCausalLM(config)
    wanted = {
        name: tuple(p.shape)
        for name, p in model.named_parameters()
        if ".router." in name or ".adapter." in name
    }
    assert {name: tuple(t.shape) for name, t in initial_routing(config, 0)} == wanted
    assert sum(len(routing_shapes(config, layer)) for layer in config.routing_layers) == len(wanted)


def test_each_tensor_stands_alone():
    config = tiny_config()
    everything = dict(initial_routing(config, 5))
    torch.manual_seed(99)  # the global generator plays no part, nor is it moved
    before = torch.random.get_rng_state()
    for name, tensor in reversed(everything.items()):
        assert torch.equal(initial_tensor(name, tuple(tensor.shape), config, 5), tensor)
    assert torch.equal(torch.random.get_rng_state(), before)
    # Routing fewer layers leaves those of the others as they were.
    fewer = dict(initial_routing(tiny_config(routing_layers=[2]), 5))
    assert fewer and all(torch.equal(everything[name], tensor) for name, tensor in fewer.items())


def test_seeds_and_layers_differ_beyond_32_bits():
    config = tiny_config()
    seen = [dict(initial_routing(config, seed)) for seed in (0, 1, 1 + 2**32)]
    name = "model.layers.{}.router.enc.weight"
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(seen[a][name.format(1)], seen[b][name.format(1)])
    assert not torch.equal(seen[0][name.format(1)], seen[0][name.format(2)])


def test_distributions_as_documented():
    config = tiny_config(hidden_size=256, intermediate_size=512, router_bias=True)
    for name, tensor in initial_routing(config, 3):
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
        else:
            last = name.endswith("adapter.down_proj.weight")
            std = config.initializer_range / 10 if last else tensor.shape[-1] ** -0.5
            # Five standard errors of a sample's deviation.
            assert abs(tensor.std() / std - 1) < 5 / (2 * tensor.numel()) ** 0.5, name


def test_model_from_a_base_takes_exactly_these():
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    ).to(torch.bfloat16)
    model = FlexiDepthForCausalLM.from_base_model(base, seed=8, routing_layers=[1, 3])
    assert model.dtype == torch.bfloat16 and not model.training
    state = model.state_dict()
    for name, tensor in initial_routing(model.config, 8):
        assert torch.equal(state[name], tensor.to(torch.bfloat16))
    for name, tensor in base.state_dict().items():
        assert torch.equal(state[name], tensor), name
        assert state[name].data_ptr() != tensor.data_ptr()
