"""Bytes that a token reads under each method."""

from __future__ import annotations

import pytest

from flexidepth.bench.ideal import bytes_per_token
from flexidepth.evaluation.costs import bytes_read
from tests.engine.conftest import tiny_config


def test_a_model_with_routers_reads_them_and_the_adapters_of_what_it_skips() -> None:
    config = tiny_config()
    for skipped in (0, 1, 3):
        assert bytes_read("flexidepth", config, skipped) == bytes_per_token(config, skipped)
    halfway = (bytes_per_token(config, 1) + bytes_per_token(config, 2)) / 2
    assert bytes_read("further", config, 1.5) == halfway
    wide = tiny_config(adapter_reduction_factor=2)
    more = 2 * 3 * config.hidden_size * (wide.adapter_dim - config.adapter_dim)
    assert bytes_read("flexidepth", wide, 2) - bytes_read("flexidepth", config, 2) == 2 * more


@pytest.mark.parametrize("method", ["static-adapters", "random-adapters"])
def test_layers_chosen_before_need_adapters_and_no_routers(method: str) -> None:
    config = tiny_config()
    for skipped in (0, 2):
        want = bytes_per_token(config, skipped, routers=False)
        assert bytes_read(method, config, skipped) == want < bytes_per_token(config, skipped)


@pytest.mark.parametrize("method", ["shortgpt", "shortgpt-routed"])
def test_a_dropped_layer_is_not_read(method: str) -> None:
    config, smaller = tiny_config(), tiny_config(num_hidden_layers=2, routing_layers=[])
    want = bytes_per_token(smaller, 0, weight_bytes=4, routers=False)
    assert bytes_read(method, config, 2, weight_bytes=4) == want


def test_a_layer_skipped_without_an_adapter_reads_keys_values_and_norms() -> None:
    config = tiny_config()
    base = bytes_read("base", config, 0)
    assert base == bytes_per_token(config, 0, routers=False)
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    kept = 2 * (2 * d * kv + 2 * d)
    assert bytes_read("random", config, 1) - bytes_read("shortgpt", config, 1) == kept
    assert bytes_read("random", config, 0) == base


def test_an_ablated_model_saves_what_it_does_not_read() -> None:
    d, f = (tiny_config().hidden_size, tiny_config().intermediate_size)
    plain = tiny_config()
    q, kv = plain.num_attention_heads * plain.head_dim, plain.num_key_value_heads * plain.head_dim
    adapter = 3 * d * plain.adapter_dim

    def saved(*ablations: str) -> float:
        config = tiny_config(ablations=list(ablations))
        return bytes_read("it", config, 0) - bytes_read("it", config, 1)

    whole = 2 * (2 * d * q + 3 * d * f - adapter)
    assert saved() == whole
    assert saved("linear_router") == whole
    assert saved("no_adapter") == whole + 2 * adapter
    assert saved("no_skipped_kv") == whole + 2 * 2 * d * kv
    assert saved("attention_only") == 2 * 2 * d * q
    assert saved("feed_forward_only") == 2 * (3 * d * f - adapter)
    less = bytes_read("it", plain, 0) - bytes_read(
        "it", tiny_config(ablations=["linear_router"]), 0
    )
    assert less == 4 * plain.num_routed_layers * d * (plain.router_dim - 1)
