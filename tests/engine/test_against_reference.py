"""The engine gives the reference's answers, whatever the configuration."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext import _C

from .conftest import tiny_config, tiny_model

MARGIN = 1e-5  # decisions closer to the threshold than this are not compared; hardly any are

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "plain": {},
    "straight_through": {"gate": "straight_through"},
    "tanh_norm": {"router_order": "tanh_norm"},
    "router_bias": {"router_bias": True},
    "thresholds": {"router_thresholds": [0.2, 0.5, 0.8]},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"base_model_type": "qwen2", "qkv_bias": True},
    "all_biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"base_model_type": "mistral", "sliding_window": 11},
    "llama3_rope": {"rope_parameters": LLAMA3},
    "one_layer_routed": {"routing_layers": [2], "router_thresholds": 0.5},
    "nothing_routed": {"routing_layers": []},
    "odd_sizes": {
        "hidden_size": 54,
        "head_dim": 10,
        "intermediate_size": 77,
        "num_key_value_heads": 1,
    },
}


def all_rows(n):
    return torch.arange(n, dtype=torch.int32)


@torch.no_grad()
def compare(model, engine, ids, force=None, tolerance=2e-5, **call):
    want = model(ids[None].long(), force_routing=force)
    cache = engine.new_cache(len(ids))
    got = engine.forward(ids, [len(ids)], [cache], logits_rows=all_rows(len(ids)), **call)
    torch.testing.assert_close(got.logits, want.logits[0].float(), rtol=tolerance, atol=tolerance)
    if model.config.num_routed_layers and call.get("routing") != "dense":
        torch.testing.assert_close(got.gates, want.gates[0], rtol=1e-5, atol=MARGIN / 2)
        assert torch.equal(got.ran.bool(), want.run[0])
    return want


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("strict", [False, True])
def test_router_decides(make_engine, ids, name, strict):
    model = tiny_model(tiny_config(**VARIANTS[name]))
    want = compare(model, make_engine(model, strict_router=strict), ids[:150])
    if want.run is not None:
        tau = torch.tensor(model.config.router_thresholds)
        assert ((want.gates[0] - tau).abs() < MARGIN).float().mean() < 0.001
        assert 0.02 < want.run.float().mean() < 0.98  # both paths were taken


@pytest.mark.parametrize("isa", _C.available_isas())
def test_every_instruction_set(make_engine, ids, isa):
    model = tiny_model(tiny_config())
    compare(model, make_engine(model, isa=isa), ids[:80])


@pytest.mark.parametrize("name", ["plain", "straight_through", "qwen2"])
def test_forced_routing(make_engine, ids, name):
    model = tiny_model(tiny_config(**VARIANTS[name]))
    engine, ids = make_engine(model), ids[:60]
    ones, zeros = torch.ones(60, 3, dtype=torch.uint8), torch.zeros(60, 3, dtype=torch.uint8)
    compare(model, engine, ids, "all", routing="forced_hard", mask=ones)
    compare(model, engine, ids, "none", routing="forced_hard", mask=zeros)
    compare(model, engine, ids, "dense", routing="dense")
    recorded = torch.randint(0, 2, (60, 3), dtype=torch.uint8)
    compare(model, engine, ids, recorded, routing="forced", mask=recorded)
    middle = zeros.clone()
    middle[:, 1] = 1
    compare(model, engine, ids, [2], routing="forced_hard", mask=middle)


@torch.no_grad()
def test_all_run_hard_is_the_base_model(make_engine, ids):
    from flexidepth.base_model import base_model_of

    from .conftest import weights_of

    model = tiny_model(tiny_config())
    base = base_model_of(model.config, weights_of(model))
    engine = make_engine(model)
    got = engine.forward(
        ids[:100], [100], [engine.new_cache(100)], routing="forced_hard",
        mask=torch.ones(100, 3, dtype=torch.uint8), logits_rows=all_rows(100),
    )  # fmt: skip
    torch.testing.assert_close(
        got.logits, base(ids[None, :100].long()).logits[0], rtol=2e-5, atol=2e-5
    )


@torch.no_grad()
def test_bfloat16_replays_the_reference(make_engine, ids):
    """bf16 weights, float32 activations: at most twice the error of torch in bf16, on the same decisions."""
    model = tiny_model(tiny_config(hidden_size=96, intermediate_size=224))
    want = model(ids[None].long())
    exact = tiny_model(model.config).double()(ids[None].long(), force_routing=want.run[0])
    engine = make_engine(model, torch.bfloat16)
    got = engine.forward(
        ids,
        [300],
        [engine.new_cache(300)],
        routing="forced",
        mask=want.run[0].to(torch.uint8),
        logits_rows=all_rows(300),
    )
    torchs = tiny_model(model.config).bfloat16()(ids[None].long(), force_routing=want.run[0])
    ours = (got.logits.double() - exact.logits[0]).square().mean().sqrt()
    theirs = (torchs.logits[0].double() - exact.logits[0]).square().mean().sqrt()
    assert ours <= 2 * theirs
    assert ours > 0  # bf16 really was used
    settled = (want.gates[0] - 0.5).abs() > 0.02
    assert torch.equal((got.gates > 0.5)[settled], want.run[0][settled])


def test_greedy_decoding_token_for_token(make_engine, ids):
    model = tiny_model(tiny_config())
    engine = make_engine(model)
    prompt = ids[:20]
    want = model.generate(prompt[None].long(), max_new_tokens=40, do_sample=False)[0, 20:].tolist()
    cache, got = engine.new_cache(80), []
    step = engine.forward(prompt, [20], [cache])
    for _ in range(40):
        got.append(int(step.logits[0].argmax()))
        step = engine.forward(torch.tensor(got[-1:], dtype=torch.int32), [1], [cache])
    assert got == want
