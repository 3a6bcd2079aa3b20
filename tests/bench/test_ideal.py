"""The limit: bytes of a token, arithmetic of a prompt."""

from __future__ import annotations

import pytest
import torch

from flexidepth import FlexiDepth, FlexiDepthConfig
from flexidepth.bench.ideal import bytes_per_token, flops_of_prompt, ideal_speedup


def config_of(d: int, f: int, layers: int, heads: int, kv: int, v: int) -> FlexiDepthConfig:
    return FlexiDepthConfig(
        vocab_size=v,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=d // heads,
        routing_layers=list(range(layers // 2, layers)),
    )


SMOLLM2 = config_of(576, 1536, 30, 9, 3, 49152)


LLAMA3 = config_of(4096, 14336, 32, 32, 8, 128256)


@pytest.mark.parametrize(
    ("config", "row"),
    [
        (
            SMOLLM2,
            {0: 0.995, 2: 1.044, 4: 1.098, 6: 1.157, 8: 1.224, 10: 1.298, 12: 1.382, 15: 1.531},
        ),
        (LLAMA3, {0: 0.996, 2: 1.051, 4: 1.113, 8: 1.262, 12: 1.456, 16: 1.722}),
    ],
)
def test_ideal_speedup_of_known_models(config: FlexiDepthConfig, row: dict[int, float]) -> None:
    for skipped, wanted in row.items():
        assert ideal_speedup(config, skipped) == pytest.approx(wanted, abs=6e-4)


def test_bytes_of_known_models() -> None:
    assert bytes_per_token(SMOLLM2, 0, routers=False) == pytest.approx(269.0e6, rel=1e-3)
    assert bytes_per_token(LLAMA3, 0, routers=False) == pytest.approx(15.01e9, rel=1e-3)


def test_bytes_follow_the_weights_of_the_model(model: str) -> None:
    """A dense token reads every base weight but the embedding table, of which it takes one row."""
    with FlexiDepth.from_pretrained(model, dtype="float32", num_threads=1) as llm:
        config = llm.config
    from flexidepth.checkpoints.checkpoint import expected_shapes

    shapes = expected_shapes(config, routing=False)
    read = sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if name not in ("model.embed_tokens.weight", "model.norm.weight")
    )
    assert bytes_per_token(config, 0, weight_bytes=4, routers=False) == 4 * read


def test_a_skipped_layer_reads_no_cache_of_its_own() -> None:
    kv = 3 * 64
    at = {
        n: bytes_per_token(SMOLLM2, n, context=1000) - bytes_per_token(SMOLLM2, n) for n in (0, 5)
    }
    assert at == {0: 4 * kv * 1000 * 30, 5: 4 * kv * 1000 * 25}


def test_prompt_arithmetic_falls_with_the_share_skipped() -> None:
    dense = flops_of_prompt(SMOLLM2, 512, 0.0, routers=False)
    matrices = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    scores = 30 * 576 * 513
    assert dense == 2 * (512 * (matrices + scores) + 49152 * 576)
    shares = [flops_of_prompt(SMOLLM2, 512, share) for share in (0.0, 0.5, 1.0)]
    assert shares[0] > dense > shares[1] > shares[2]
    assert shares[0] - shares[1] == pytest.approx(shares[1] - shares[2])
