"""Tokenizers out of GGUF metadata give the ids of llama.cpp."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoTokenizer

from flexidepth import FlexiDepth
from flexidepth.checkpoints import convert
from flexidepth.checkpoints.directory import directory_tokenizer
from flexidepth.checkpoints.gguf_header import read_header
from flexidepth.checkpoints.gguf_tokenizer import gguf_tokenizer
from flexidepth.errors import CheckpointError, UnsupportedError
from tests.checkpoints.tiny import SIZES, TEMPLATE, add_tokenizer, base_model, save_base, write_gguf

PRES = ["smollm", "qwen2", "llama-bpe"]
TEXTS = [
    "",
    "hello hello",
    "hello123 1234",
    "it's 12'3s",
    "café\n\n\nca  hello",
    "<|im_start|>user hello<|im_end|>\n<tool>12",
    "  \t x = [1, 22, 333]; ",
    "日本 12³½ 😀",
    "(ca);\n(x;\n\n",  # where the pre-tokenizers bind punctuation differently
    "wow wow",  # a token no merge leads to
]
# Made by llama.cpp from the same vocabulary.
# fmt: off
IDS: dict[str, list[list[int]]] = {
    "smollm": [
        [],
        [264, 265],
        [264, 19, 20, 21, 223, 19, 20, 21, 22],
        [75, 86, 266, 223, 19, 20, 9, 21, 85],
        [270, 72, 269, 267, 201, 270, 223, 265],
        [1, 87, 85, 71, 84, 265, 2, 201, 274, 19, 20],
        [268, 200, 223, 90, 223, 31, 223, 61, 19, 14, 223, 20, 20, 14, 223, 21, 21, 21, 63, 29, 223],
        [165, 248, 101, 165, 253, 108, 223, 19, 20, 129, 114, 129, 124, 223, 175, 256, 249, 225],
        [10, 270, 11, 29, 201, 10, 90, 29, 267],
        [89, 81, 89, 223, 89, 81, 89],
    ],
    "qwen2": [
        [],
        [264, 265],
        [264, 19, 20, 21, 223, 19, 20, 21, 22],
        [75, 86, 266, 223, 19, 20, 9, 21, 85],
        [270, 72, 269, 267, 201, 270, 223, 265],
        [1, 87, 85, 71, 84, 265, 2, 201, 274, 19, 20],
        [268, 200, 223, 90, 223, 31, 223, 61, 19, 14, 223, 20, 20, 14, 223, 21, 21, 21, 63, 29, 223],
        [165, 248, 101, 165, 253, 108, 223, 19, 20, 129, 114, 129, 124, 223, 175, 256, 249, 225],
        [271, 11, 272, 10, 90, 29, 267],
        [89, 81, 89, 223, 89, 81, 89],
    ],
    "llama-bpe": [
        [],
        [264, 265],
        [264, 260, 223, 260, 22],
        [75, 86, 266, 223, 259, 9, 21, 85],
        [270, 72, 269, 267, 201, 270, 223, 265],
        [1, 87, 85, 71, 84, 265, 2, 201, 274, 259],
        [268, 200, 223, 90, 223, 31, 223, 61, 19, 14, 223, 20, 20, 14, 223, 21, 21, 21, 63, 29, 223],
        [165, 248, 101, 165, 253, 108, 223, 259, 129, 114, 129, 124, 223, 175, 256, 249, 225],
        [271, 11, 272, 10, 90, 29, 267],
        [273, 223, 89, 81, 89],
    ],
}
# fmt: on


def vocabulary_file(path: Path, pre: str, **flags: bool) -> Path:
    """A GGUF file without tensors; flags: add_bos_token, add_eos_token."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, pre)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer(tmp_path: Path, pre: str = "smollm", **flags: bool) -> Any:
    return gguf_tokenizer(read_header(vocabulary_file(tmp_path / f"{pre}.gguf", pre, **flags)))


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("pre", PRES)
def test_ids_are_those_of_the_table(tmp_path: Path, pre: str) -> None:
    ours = tokenizer(tmp_path, pre)
    for text, ids in zip(TEXTS, IDS[pre], strict=True):
        assert plain(ours, text) == ids, text


@pytest.mark.parametrize("pre", PRES)
def test_ids_are_those_of_llama_cpp(tmp_path: Path, pre: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = vocabulary_file(tmp_path / f"{pre}.gguf", pre)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ours = gguf_tokenizer(read_header(path))
    for text in TEXTS:
        assert plain(ours, text) == theirs.tokenize(text.encode(), add_bos=False, special=True)


FLAGS = [
    ("smollm", {}, [], []),
    ("llama-bpe", {}, [1], []),  # where a file does not say, llama.cpp adds BOS for this one alone
    ("llama-bpe", {"add_bos_token": False}, [], []),
    ("smollm", {"add_bos_token": True}, [1], []),
    ("qwen2", {"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ("qwen2", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
]


@pytest.mark.parametrize(("pre", "flags", "before", "after"), FLAGS)
def test_bos_and_eos_are_added_as_the_file_says(
    tmp_path: Path, pre: str, flags: dict[str, bool], before: list[int], after: list[int]
) -> None:
    ours = tokenizer(tmp_path, pre, **flags)
    assert ours.encode("hello hello") == [*before, 264, 265, *after]
    assert plain(ours, "hello hello") == [264, 265]
    assert ours("hello", "hello")["input_ids"] == [*before, 264, *after, *before, 264, *after]
    ours.save_pretrained(tmp_path / "saved")
    for again in (
        directory_tokenizer(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        assert again.encode("hello hello") == [*before, 264, 265, *after]


@pytest.mark.parametrize(("pre", "flags", "before", "after"), FLAGS)
def test_llama_cpp_adds_the_same(
    tmp_path: Path, pre: str, flags: dict[str, bool], before: list[int], after: list[int]
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = vocabulary_file(tmp_path / "v.gguf", pre, **flags)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    assert theirs.tokenize(b"hello", special=True) == [*before, 264, *after]


def test_a_bos_to_add_that_the_file_does_not_have(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path / "v.gguf", "smollm", add_bos_token=True)
    path.write_bytes(path.read_bytes().replace(b"ggml.bos_token_id", b"ggml.bos_token_ix"))
    with pytest.raises(CheckpointError, match=r"add_bos_token is True, .*bos_token_id is missing"):
        gguf_tokenizer(read_header(path))


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.decode(plain(ours, text)) == text


def test_special_tokens_vanish_on_request_and_user_defined_ones_stay(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    ids = ours("<|im_start|>hello<tool><|im_end|>")["input_ids"]
    assert ours.decode(ids, skip_special_tokens=True) == "hello<tool>"


def test_special_ids_and_the_chat_template(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 0)
    assert ours.chat_template == TEMPLATE
    assert ours.model_max_length == SIZES["max_position_embeddings"]
    chat = ours.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello<|im_end|>"
    assert ours(chat)["input_ids"].count(ours.bos_token_id) == 1


@pytest.mark.parametrize("pre", PRES)
def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: Path, pre: str) -> None:
    ours = tokenizer(tmp_path, pre)
    ours.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert [plain(again, text) for text in TEXTS] == IDS[pre]
    assert [again(text)["input_ids"] for text in TEXTS] == [
        ours(text)["input_ids"] for text in TEXTS
    ]
    assert (again.eos_token_id, again.chat_template) == (2, TEMPLATE)


@pytest.mark.parametrize("pre", ["deepseek-llm", "default"])
def test_an_unknown_pre_tokenizer_is_named(tmp_path: Path, pre: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"'{pre}' is not implemented; .*smollm, qwen2, llama-bpe"
    ):
        tokenizer(tmp_path, pre)


@pytest.mark.parametrize(("model", "pre"), [("gpt2", "deepseek-llm"), ("t5", "default")])
def test_a_model_with_an_unknown_tokenizer_takes_token_ids(
    tmp_path: Path, model: str, pre: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", base_model(), tokenizer=model, pre=pre)
    said: list[str] = []
    with FlexiDepth.from_pretrained(path, num_threads=1, notify=said.append) as llm:
        assert llm.tokenizer is None
        assert len(llm.generate([1, 264], max_new_tokens=2).token_ids) == 2
        with pytest.raises(UnsupportedError, match="came without a tokenizer; pass token ids"):
            llm.generate("hello")
    (note,) = said
    assert f"{path}: tokenizer '{model}' with pre-tokenizer '{pre}' is not implemented" in note
    assert note.endswith("loaded without a tokenizer: give token ids")
    with pytest.warns(UserWarning, match="loaded without a tokenizer"):
        out = convert(path, tmp_path / "out")  # nobody to notify
    assert not list(out.glob("tokenizer*"))


@pytest.mark.parametrize("kind", ["gguf", "directory"])
def test_a_damaged_tokenizer_is_found_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "model"
    if kind == "gguf":
        write_gguf(path, base_model())
        path.write_bytes(path.read_bytes().replace(b"he ll", b"he zz"))
    else:
        save_base(path)
        (path / "tokenizer.json").write_text("{")

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("flexidepth_ext.engine.Engine", load)
    with pytest.raises(CheckpointError, match=r"merges do not fit|tokenizer cannot be read"):
        FlexiDepth.from_pretrained(path)


def test_merges_outside_the_vocabulary(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path / "v.gguf", "smollm")
    path.write_bytes(path.read_bytes().replace(b"he ll", b"he zz"))
    with pytest.raises(CheckpointError, match="merges do not fit"):
        gguf_tokenizer(read_header(path))


def test_repeated_tokens(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path / "v.gguf", "smollm")
    path.write_bytes(path.read_bytes().replace(b"<unused0>", b"<unused1>"))
    with pytest.raises(CheckpointError, match="320 tokens, 319 of them different"):
        gguf_tokenizer(read_header(path))


def test_a_special_token_outside_the_vocabulary(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path / "v.gguf", "smollm")
    key = b"tokenizer.ggml.eos_token_id"
    data = path.read_bytes().replace(
        key + struct.pack("<II", 4, 2), key + struct.pack("<II", 4, 999)
    )
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="eos token is 999; the vocabulary has 320"):
        gguf_tokenizer(read_header(path))


def test_missing_metadata(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path / "v.gguf", "smollm")
    path.write_bytes(path.read_bytes().replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.merges is NoneType"):
        gguf_tokenizer(read_header(path))
