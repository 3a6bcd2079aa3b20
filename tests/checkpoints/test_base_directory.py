"""Hugging Face directories of base models give transformers' own weights and logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexidepth.checkpoints import directory, open_checkpoint
from flexidepth.checkpoints.checkpoint import expected_shapes
from flexidepth.modeling import FlexiDepthForCausalLM
from tests.checkpoints.tiny import rope_arguments, save_base, state

KINDS = ["llama", "qwen2", "mistral"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_tensors_are_those_of_transformers(tmp_path: Path, kind: str, shard: str) -> None:
    model = save_base(tmp_path, kind, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "100KB")
    checkpoint = open_checkpoint(tmp_path, routing={"routing_layers": []})
    tensors = dict(checkpoint.tensors())
    expected = state(model)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert checkpoint.routers_trained is False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_with_all_layers_run_the_logits_are_those_of_transformers(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    base = save_base(tmp_path, kind, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings is tied
    model = FlexiDepthForCausalLM(checkpoint.config).eval()
    # The tied head is a second name of the embedding in state_dict and absent from the stream.
    model.load_state_dict(dict(checkpoint.tensors()), strict=not tied)
    ids = torch.randint(0, 320, (2, 12))
    with torch.no_grad():
        ours, theirs = model(ids, force_routing="all").logits, base(ids).logits
        skipped = model(ids, force_routing="none").logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(skipped, theirs, atol=1e-2)


def test_the_stream_is_in_layer_order_with_seeded_routers_between(llama_dir: Path) -> None:
    checkpoint = open_checkpoint(llama_dir)
    names = [name for name, _ in checkpoint.tensors()]
    assert names == list(expected_shapes(checkpoint.config))
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert checkpoint.config.routing_layers == [2, 3]


def test_a_seed_gives_the_same_routers_and_another_seed_others(llama_dir: Path) -> None:
    name = "model.layers.2.router.enc.weight"
    first, again, other = (
        dict(open_checkpoint(llama_dir, seed=seed).tensors())[name] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_keep_their_stored_type(llama_dir: Path, dtype: torch.dtype) -> None:
    path = llama_dir / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    tensors = dict(open_checkpoint(llama_dir).tensors())
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == dtype


def test_a_tied_head_stored_twice_and_old_constants_are_ignored(tmp_path: Path) -> None:
    save_base(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, path)
    assert "lm_head.weight" not in dict(open_checkpoint(tmp_path).tensors())


def test_a_file_is_not_kept_mapped_for_longer_than_a_few_tensors(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(llama_dir, routing={"routing_layers": []})
    whole = dict(checkpoint.tensors())
    opened = []
    monkeypatch.setattr(directory, "_MAPPED_BYTES", 100_000)
    monkeypatch.setattr(
        directory, "_open", lambda path: opened.append(path) or safe_open(path, "pt")
    )
    assert all(torch.equal(tensor, whole[name]) for name, tensor in checkpoint.tensors())
    size = sum(tensor.nbytes for tensor in whole.values())
    largest = max(tensor.nbytes for tensor in whole.values())
    assert size / (100_000 + largest) <= len(opened) <= size / 100_000 + 1


def test_special_tokens_of_generation_config_win(llama_dir: Path) -> None:
    (llama_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    config = open_checkpoint(llama_dir).config
    assert config.eos_token_id == [2, 5]
    assert config.bos_token_id == 1


def test_the_estimate_counts_matrices_in_the_type_and_the_rest_in_float32(llama_dir: Path) -> None:
    checkpoint = open_checkpoint(llama_dir, routing={"routing_layers": []})
    matrices = sum(t.numel() for _, t in checkpoint.tensors() if t.dim() == 2)
    norms = sum(t.numel() for _, t in checkpoint.tensors() if t.dim() == 1)
    assert checkpoint.nbytes_estimate(torch.bfloat16) == 2 * matrices + 4 * norms
    assert checkpoint.nbytes_estimate(torch.float32) == 4 * (matrices + norms)


def test_llama3_rope_scaling_reaches_the_logits(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    base = save_base(tmp_path, **rope_arguments(rope))
    checkpoint = open_checkpoint(tmp_path)
    model = FlexiDepthForCausalLM(checkpoint.config).eval()
    model.load_state_dict(dict(checkpoint.tensors()))
    ids = torch.randint(0, 320, (1, 100))
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, force_routing="all").logits, base(ids).logits, rtol=1e-5, atol=1e-5
        )


def test_a_tokenizer_is_found_beside_the_weights(llama_dir: Path) -> None:
    assert open_checkpoint(llama_dir).tokenizer() is None
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b")).save(
        str(llama_dir / "tokenizer.json")
    )
    tokenizer = open_checkpoint(llama_dir).tokenizer()
    assert tokenizer("a")["input_ids"] == [0]
