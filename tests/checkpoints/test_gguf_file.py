"""GGUF as a source of base weights: values, order of rotary rows, configuration, damaged files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flexidepth.checkpoints import open_checkpoint
from flexidepth.checkpoints.checkpoint import expected_shapes
from flexidepth.checkpoints.gguf_header import read_header
from flexidepth.errors import CheckpointError, UnsupportedError
from flexidepth.modeling import FlexiDepthForCausalLM
from tests.checkpoints.tiny import base_model, rope_arguments, state, write_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", base_model())


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0])
def test_tensors_are_the_dequantised_ones_in_transformers_order(
    tmp_path: Path, arch: str, kind: Kind
) -> None:
    model = base_model(arch)
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "tiny.gguf", model, kind), routing={"routing_layers": []}
    )
    tensors = dict(checkpoint.tensors())
    expected = state(model)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        values = tensor.numpy()
        if values.ndim == 2:  # rows are quantised one by one, so their order does not matter here
            values = dequantize(quantize(values, kind), kind)
        assert tensors[name].dtype == torch.float32
        assert np.array_equal(tensors[name].numpy(), values), name


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers(tmp_path: Path, arch: str, tied: bool) -> None:
    base = base_model(arch, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", base))
    model = FlexiDepthForCausalLM(checkpoint.config).eval()
    model.load_state_dict(dict(checkpoint.tensors()), strict=not tied)
    ids = torch.randint(0, 320, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, force_routing="all").logits, base(ids).logits, rtol=1e-5, atol=1e-5
        )


def test_biases_of_a_llama_are_reordered_with_their_rows(tmp_path: Path) -> None:
    base = base_model(attention_bias=True, mlp_bias=True)
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "tiny.gguf", base), routing={"routing_layers": []}
    )
    assert (checkpoint.config.attention_bias, checkpoint.config.mlp_bias) == (True, True)
    expected = state(base)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.tensors())


def test_the_configuration_comes_from_the_metadata(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    model = base_model(rms_norm_eps=3e-6, **rope_arguments(rope))
    metadata = {"tokenizer.ggml.eot_token_id": 0}
    checkpoint = open_checkpoint(
        write_gguf(tmp_path / "tiny.gguf", model, metadata=metadata), seed=1
    )
    config = checkpoint.config
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "bos_token_id",
        "pad_token_id",
    ):
        assert getattr(config, key) == getattr(model.config, key), key
    assert config.rope_parameters == rope
    assert config.rms_norm_eps == pytest.approx(3e-6)
    assert config.eos_token_id == [2, 0]
    assert config.routing_layers == [2, 3]
    assert checkpoint.routers_trained is False
    assert [name for name, _ in checkpoint.tensors()] == list(expected_shapes(config))


def test_a_large_embedding_is_read_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(open_checkpoint(file).tensors())
    monkeypatch.setattr("flexidepth.checkpoints.gguf_file._BYTES_AT_ONCE", 7 * 64 * 4)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in open_checkpoint(file).tensors())


def llama3_factors(config: Any) -> np.ndarray:
    """What llama.cpp's converter stores: unscaled frequency over scaled frequency."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / scaled).numpy()


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path: Path) -> None:
    model = base_model(head_dim=32, **rope_arguments(LLAMA3))
    factors = llama3_factors(model.config)
    assert (factors.min(), factors.max()) == pytest.approx((1, 32))
    assert np.any((factors > 1.5) & (factors < 31))  # the band between, where a mistake would show
    path = write_gguf(
        tmp_path / "tiny.gguf",
        model,
        metadata={"llama.attention.key_length": 32},
        tensors={"rope_freqs.weight": factors},
    )
    assert open_checkpoint(path).config.rope_parameters == pytest.approx(LLAMA3)


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    factors = np.array([1, 1, 1, 2, 4, 8, 8, 8], np.float32)
    path = write_gguf(tmp_path / "tiny.gguf", base_model(), tensors={"rope_freqs.weight": factors})
    with pytest.raises(UnsupportedError, match="not those of Llama 3"):
        open_checkpoint(path)


def test_linear_scaling(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "tiny.gguf", base_model(), metadata=metadata)
    rope = open_checkpoint(path).config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("arch", "metadata", "reason"),
    [
        ("gemma", {}, "architecture 'gemma' is not implemented; llama and qwen2"),
        ("llama", {"llama.expert_count": 8}, "mixtures of experts"),
        ("llama", {"llama.rope.dimension_count": 8}, "partial rotary"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ("llama", {"split.count": 3}, "one of 3 parts"),
    ],
)
def test_an_unsupported_variant_is_named(
    tmp_path: Path, arch: str, metadata: dict[str, Any], reason: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", base_model(), arch=arch, metadata=metadata)
    with pytest.raises(NotImplementedError, match=reason):
        open_checkpoint(path)


def test_a_type_without_dequantisation_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: Any, kind: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr("flexidepth.checkpoints.gguf_file.dequantize", refuse)
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight is F32"):
        next(open_checkpoint(file).tensors())


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", base_model(), omit=("blk.1.ffn_up.weight",))
    with pytest.raises(
        CheckpointError, match=r"1 tensors missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"
    ):
        open_checkpoint(path)


def test_a_shape_that_contradicts_the_metadata(tmp_path: Path) -> None:
    model = base_model()
    model.config.intermediate_size = 256
    path = write_gguf(tmp_path / "tiny.gguf", model)
    with pytest.raises(
        CheckpointError, match=r"ffn_gate\.weight is \[128, 64\]; its metadata say \[256, 64\]"
    ):
        open_checkpoint(path)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_says_so_wherever_it_is_cut(file: Path, share: float) -> None:
    data = file.read_bytes()
    cut = max(int(len(data) * share), 4)
    file.write_bytes(data[:cut])
    with pytest.raises(CheckpointError, match=rf"truncated: .*{cut}"):
        open_checkpoint(file)


def test_every_cut_of_the_header_is_noticed(file: Path) -> None:
    data = file.read_bytes()
    end = min(info.offset for info in read_header(file).tensors.values())
    for cut in range(0, end, 97):
        file.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            read_header(file)


def test_a_file_cut_while_it_is_read(file: Path) -> None:
    stream = open_checkpoint(file).tensors()
    next(stream)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cut short"):
        list(stream)


@pytest.mark.parametrize(
    ("at", "new", "error", "reason"),
    [
        (0, b"PK\x03\x04", CheckpointError, "not a GGUF file"),
        (4, struct.pack("<I", 1), UnsupportedError, "GGUF version 1;"),
        (4, struct.pack(">I", 3), UnsupportedError, "big-endian"),
        (8, struct.pack("<Q", 1 << 60), CheckpointError, "truncated|dimensions|unknown"),
        (16, struct.pack("<Q", 1 << 60), CheckpointError, "truncated|unknown type"),
        (24, struct.pack("<Q", 1 << 62), CheckpointError, "truncated"),
    ],
)
def test_a_damaged_start(
    file: Path, at: int, new: bytes, error: type[Exception], reason: str
) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + len(new)] = new
    file.write_bytes(data)
    with pytest.raises(error, match=reason):
        open_checkpoint(file)


def test_an_offset_outside_the_file(file: Path) -> None:
    data = bytearray(file.read_bytes())
    name = b"blk.2.ffn_down.weight"
    # behind the name: number of dimensions, two dimensions, type, offset
    at = data.index(name) + len(name) + 4 + 16 + 4
    data[at : at + 8] = struct.pack("<Q", 1 << 40)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk\.2\.ffn_down\.weight ends at byte 109951"):
        open_checkpoint(file)


def test_an_unknown_tensor_type(file: Path) -> None:
    data = bytearray(file.read_bytes())
    name = b"blk.2.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 16
    data[at : at + 4] = struct.pack("<I", 999)
    file.write_bytes(data)
    with pytest.raises(UnsupportedError, match="type 999"):
        open_checkpoint(file)


@pytest.mark.parametrize(("value", "reason"), [(0, "is 0; a positive number"), ("4", "is '4'")])
def test_metadata_that_cannot_be_used(tmp_path: Path, value: Any, reason: str) -> None:
    key = "llama.attention.head_count_kv"
    writer_key = {int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}[type(value)]
    model = base_model()
    path = write_gguf(tmp_path / "tiny.gguf", model)
    data = path.read_bytes()
    at = data.index(key.encode()) + len(key)
    old = data[at : at + 8]  # type code and value
    new = struct.pack("<I", writer_key) + (
        struct.pack("<I", value)
        if isinstance(value, int)
        else struct.pack("<Q", len(value)) + value.encode()
    )
    assert old == struct.pack("<II", 4, 2)
    path.write_bytes(data[:at] + new + data[at + 8 :])
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(path)


def test_heads_that_differ_by_layer_are_not_implemented(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", base_model())
    key = b"llama.attention.head_count_kv"
    data = path.read_bytes()
    at = data.index(key) + len(key)
    array = struct.pack("<IIQ4I", 9, 4, 4, 2, 2, 1, 2)
    path.write_bytes(data[:at] + array + data[at + 8 :] + bytes(64))  # room for the new alignment
    with pytest.raises(UnsupportedError, match="differs from layer to layer"):
        open_checkpoint(path)
