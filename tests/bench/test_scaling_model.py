"""Bytes and time of a step: small cases by hand, and the ideal line that every plot has."""

from __future__ import annotations

import math

import pytest

from flexidepth import FlexiDepthConfig
from flexidepth.bench.ideal import bytes_per_token, flops_of_prompt, ideal_speedup
from flexidepth.bench.ideal import step_bytes as gpu_step_bytes
from flexidepth.bench.models import model_config, skip_masks
from flexidepth.bench.scaling.costs import (
    Layers,
    dense_bytes,
    layer_bytes,
    resident_bytes,
    step_bytes,
    token_bytes,
)
from flexidepth.bench.scaling.devices import (
    CPU_LATENCY,
    CPU_PHASES,
    CUDA_LATENCY,
    CUDA_PHASES,
    H100,
    LAPTOP,
    Latency,
    Phases,
)
from flexidepth.bench.scaling.model import (
    Machine,
    break_even,
    dense_seconds,
    prompt_seconds,
    token_seconds,
)
from flexidepth.bench.scaling.precision import BF16, FLOAT32, INT4, INT4_HEAD16, INT8
from flexidepth.bench.scaling.shapes import SHAPES, STUDIED, shape_config
from flexidepth.errors import ValueOutOfRangeError

# d 32, q 32, kv 16, f 64, adapter 4, router 2, 3 layers of which 2 are routed, vocabulary 100
SMALL = FlexiDepthConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    routing_layers=[1, 2],
)
ALWAYS, RUNS, SKIPS = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 64, 3 * 32 * 4
NORMS, ROUTERS, HEAD = 2 * 32, 4 * 2 * 32 * 2, 100 * 32


def test_a_token_by_hand() -> None:
    """Three layers of 1024 + 8192 weights, one of them skipped for an adapter of 384; 5 tokens of 2 x 16 values."""
    weights = 3 * ALWAYS + 2 * RUNS + SKIPS + 3 * NORMS + HEAD
    assert token_bytes(SMALL, BF16, 1, context=5) == 2 * weights + ROUTERS + 2 * (2 * 2 * 16 * 5)
    dense = 3 * (ALWAYS + RUNS + NORMS) + HEAD
    assert dense_bytes(SMALL, BF16) == 2 * dense


def test_a_quantised_token_by_hand() -> None:
    """4 bits and a 16-bit scale for 32 weights are 4.5 bits; norms and the cache stay 16-bit, routers float32."""
    matrices = 3 * ALWAYS + RUNS + 2 * SKIPS
    rest = 2 * 3 * NORMS + ROUTERS + 2 * 2 * 16 * 7
    int4 = matrices * 4.5 / 8 + rest
    assert token_bytes(SMALL, INT4, 2, context=7) == int4 + HEAD * 4.5 / 8
    assert token_bytes(SMALL, INT4_HEAD16, 2, context=7) == int4 + HEAD * 2
    assert token_bytes(SMALL, INT8, 2, context=7) == matrices * 8.5 / 8 + rest + HEAD * 8.5 / 8


def test_a_batch_reads_weights_once_and_every_row_its_own_cache() -> None:
    layers = Layers(rows=3, running=2, skipping=1, attending=5)
    weights = 3 * ALWAYS + 3 * RUNS + SKIPS + 3 * NORMS + HEAD
    cache = 2 * 2 * 16 * 10 * (3 + 5)
    assert step_bytes(SMALL, BF16, layers, context=10) == 2 * weights + ROUTERS + cache


@pytest.mark.parametrize("model", STUDIED)
@pytest.mark.parametrize("adapter_factor", [16, 8])
@pytest.mark.parametrize("context", [0, 128, 4096])
def test_bf16_is_the_ideal_line(model: str, adapter_factor: int, context: int) -> None:
    config = shape_config(model, adapter_factor)
    dense = dense_bytes(config, BF16, context=context)
    assert dense == bytes_per_token(config, 0, context=context, routers=False)
    for skipped in (0, 1, config.num_routed_layers):
        read = token_bytes(config, BF16, skipped, context=context)
        assert read == bytes_per_token(config, skipped, context=context)
        assert dense / read == pytest.approx(ideal_speedup(config, skipped, context=context))
    assert token_bytes(config, FLOAT32, 1) == bytes_per_token(config, 1, weight_bytes=4)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_batch_is_that_of_the_gpu_check(rows: int) -> None:
    config = model_config("smollm2-135m")
    for mask in skip_masks(config, rows, 6, 3):
        run = mask.bool()
        layers = Layers(rows, int(run.any(0).sum()), int((~run).any(0).sum()), int(run.sum()))
        assert step_bytes(config, BF16, layers, context=64) == gpu_step_bytes(
            config, mask, 2, 64, rows
        )
    assert dense_bytes(config, BF16, rows=rows, context=64) == gpu_step_bytes(
        config, None, 2, 64, rows
    )


def test_known_models() -> None:
    eight = layer_bytes(shape_config("llama-3-8b"), BF16)
    assert eight.always + eight.runs == pytest.approx(436.2e6, rel=1e-3)
    assert eight.always + eight.skips == pytest.approx(38.8e6, rel=1e-3)
    parameters = {"smollm2-135m": 134.5e6, "llama-3.2-1b": 1.236e9, "llama-3-8b": 8.030e9}
    parameters |= {"llama-3-70b": 70.55e9, "llama-2-7b": 6.738e9}
    assert parameters.keys() == SHAPES.keys()
    for name, count in parameters.items():
        config = shape_config(name)
        plain = FlexiDepthConfig(**SHAPES[name], routing_layers=[])
        assert resident_bytes(plain, BF16) == pytest.approx(2 * count, rel=1e-3), name
        assert config.num_routed_layers == config.num_hidden_layers // 2


def test_a_tied_embedding_lies_in_memory_once_and_the_cache_has_no_holes() -> None:
    tied = FlexiDepthConfig(**{**SHAPES["llama-3-8b"], "tie_word_embeddings": True})
    untied = shape_config("llama-3-8b")
    assert resident_bytes(untied, INT4) - resident_bytes(tied, INT4) == 128256 * 4096 * 4.5 / 8
    cache = resident_bytes(tied, INT4, rows=2, context=100) - resident_bytes(tied, INT4)
    assert cache == 2 * 100 * 32 * 2 * 2 * 1024


def machine(latency: Latency, phases: Phases, share: float = 0.5) -> Machine:
    return Machine(bandwidth=1e-3, share=share, phases=phases, latency=latency)  # 1 MB a second


def test_time_by_hand() -> None:
    """One plain layer and two routed ones, one of them skipped, 2 us a phase and 0.5 us an idle one."""
    phases = Phases(dense=5, always=2, run=4, skip=3, token=1)
    own = machine(Latency(2.0, 0.5), phases)
    waiting = 1e-6 * (2 * (5 + 1 + 2 * 2) + 2 * (4 + 3) + 0.5 * (4 + 3))
    read = token_bytes(SMALL, BF16, 1) / 0.5e6
    assert token_seconds(own, SMALL, BF16, 1) == pytest.approx(read + waiting)
    dense = dense_bytes(SMALL, BF16) / 0.5e6 + 1e-6 * 2 * (3 * 5 + 1)
    assert dense_seconds(own, SMALL, BF16) == pytest.approx(dense)


def test_phases_of_the_engines() -> None:
    """A layer that runs has one phase more than a plain one: queries wait for the gate."""
    for phases, latency in ((CPU_PHASES, CPU_LATENCY), (CUDA_PHASES, CUDA_LATENCY)):
        assert phases.always + phases.run == phases.dense + 1
        assert phases.always + phases.skip < phases.dense
        own = machine(latency, phases)
        idle = phases.skip * latency.idle_us * SMALL.num_routed_layers
        extra = own.waiting(SMALL, Layers(1, 2, 0, 2)) - own.waiting(SMALL, None)
        assert extra == pytest.approx(1e-6 * (2 * latency.phase_us + idle))


def test_without_latencies_speedups_are_the_ideal_ones_on_every_machine() -> None:
    config = shape_config("llama-3-8b")
    for share in (0.3, 1.0):
        own = machine(Latency(0, 0), CUDA_PHASES, share)
        speedup = dense_seconds(own, config, BF16) / token_seconds(own, config, BF16, 8)
        assert speedup == pytest.approx(ideal_speedup(config, 8))


def test_at_the_break_even_time_is_that_of_the_dense_model() -> None:
    config = shape_config("llama-3.2-1b")
    own = Machine.of(H100)
    skipped = break_even(own, config, INT4, context=128)
    assert 0 < skipped < config.num_routed_layers
    dense = dense_seconds(own, config, INT4, context=128)
    assert token_seconds(own, config, INT4, skipped, context=128) == pytest.approx(dense)
    never = Machine(1e12, 1.0, Phases(5, 1, 1, 4, 1), Latency(1, 0))
    assert break_even(never, config, BF16) == math.inf


def test_the_share_fitted_on_the_dense_row_gives_that_row_back() -> None:
    config = shape_config("smollm2-135m", 8)
    before = Machine.of(LAPTOP)
    fitted = before.fitted(config, BF16, 0.02, rows=1, context=128)
    assert dense_seconds(fitted, config, BF16, context=128) == pytest.approx(0.02)
    assert fitted.latency == before.latency
    with pytest.raises(ValueOutOfRangeError, match="its phases alone"):
        before.fitted(config, BF16, 1e-5, rows=1, context=128)


def test_prompts_follow_arithmetic_where_they_are_long_and_weights_where_they_are_short() -> None:
    config = shape_config("llama-3-8b")
    dense, routed = (prompt_seconds(H100, config, BF16, 2048, share) for share in (None, 0.5))
    flops = flops_of_prompt(config, 2048, 0.0, routers=False)
    assert dense == pytest.approx(flops / (0.5 * 989.4e12))
    assert dense / routed == pytest.approx(flops / flops_of_prompt(config, 2048, 0.5))
    one = prompt_seconds(H100, config, BF16, 1, None)
    assert one == pytest.approx(dense_bytes(config, BF16) / (0.9 * 3350e9))
