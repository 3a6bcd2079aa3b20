"""SentencePiece tokenizers out of GGUF metadata give the ids of llama.cpp."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

from flexidepth import FlexiDepth
from flexidepth.checkpoints.directory import directory_tokenizer
from flexidepth.checkpoints.gguf_header import read_header
from flexidepth.checkpoints.gguf_tokenizer import gguf_tokenizer
from flexidepth.errors import CheckpointError
from flexidepth.generation.text import TextStream
from tests.checkpoints.tiny import SIZES, add_tokenizer, base_model, write_gguf

TEXTS = [
    "",
    " ",
    "hello hello",
    "  hello   café ",
    "</s>hello<s> ca<tool>ca",
    "<unk>x<",
    "日本 😀\n\nwor 12³",
    "hellohell he\n\tworker",
]
# Made by llama.cpp from the same vocabulary.
# fmt: off
WITH_PREFIX: list[list[int]] = [
    [],
    [259],
    [264, 264],
    [259, 264, 259, 266, 267, 275],
    [2, 264, 1, 259, 265, 292, 266],
    [0, 275, 123, 288],
    [275, 233, 154, 168, 233, 159, 175, 275, 243, 162, 155, 131, 291, 291, 286, 270, 275, 272, 197, 182],
    [264, 262, 275, 260, 291, 12, 286, 270, 110, 273],
]
WITHOUT_PREFIX: list[list[int]] = [
    [],
    [275],
    [263, 264],
    [259, 263, 259, 266, 267, 275],
    [2, 263, 1, 266, 292, 265],
    [0, 123, 288],
    [233, 154, 168, 233, 159, 175, 275, 243, 162, 155, 131, 291, 291, 286, 270, 275, 272, 197, 182],
    [263, 262, 275, 260, 291, 12, 286, 270, 110, 273],
]
# fmt: on
PIECES = [
    "hello",
    " ",
    "  ",
    "café",
    "wor",
    "12",
    "日",
    "<s>",
    "<s",
    ">",
    "<tool>",
    "\n",
    "ca",
    "l",
]


def vocabulary_file(path: Path, **flags: bool) -> Path:
    """A GGUF file without tensors; flags: add_bos_token, add_space_prefix, ..."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, model="llama")
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer(tmp_path: Path, **flags: bool) -> Any:
    return gguf_tokenizer(read_header(vocabulary_file(tmp_path / "v.gguf", **flags)))


@pytest.mark.parametrize(
    ("flags", "table"), [({}, WITH_PREFIX), ({"add_space_prefix": False}, WITHOUT_PREFIX)]
)
def test_ids_are_those_of_the_table(
    tmp_path: Path, flags: dict[str, bool], table: list[list[int]]
) -> None:
    ours = tokenizer(tmp_path, **flags)
    for text, ids in zip(TEXTS, table, strict=True):
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == [1, *ids]  # BOS, where a file does not say


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_space_prefix": False},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
    ],
)
def test_ids_are_those_of_llama_cpp(tmp_path: Path, flags: dict[str, bool]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    path = vocabulary_file(tmp_path / "v.gguf", **flags)
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ours = gguf_tokenizer(read_header(path))
    draw = random.Random(0)
    for text in (*TEXTS, *("x" + "".join(draw.choices(PIECES, k=8)) for _ in range(200))):
        assert ours.encode(text) == theirs.tokenize(text.encode(), special=True), text


def test_decoding_gives_the_text_back(tmp_path: Path) -> None:
    for prefix in (True, False):
        ours = tokenizer(tmp_path, add_space_prefix=prefix)
        for text in TEXTS:
            if not prefix or "<" not in text:  # behind a special token the added space stays
                assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
        ids = ours.encode("<s>hello<tool></s>")
        assert ours.decode(ids, skip_special_tokens=True).replace(" ", "") == "hello<tool>"


def test_a_stream_never_holds_half_a_character(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    stream = TextStream(ours, [], True)
    pieces = [stream.push(i) for i in ours.encode("日本 hello")]
    assert "".join(pieces) + stream.finish() == "日本 hello"
    assert any(piece.startswith("日本") for piece in pieces) and "\ufffd" not in "".join(pieces)


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: Path) -> None:
    ours = tokenizer(tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    again = directory_tokenizer(tmp_path / "saved")
    assert again is not None
    assert [again.encode(text) for text in TEXTS] == [[1, *ids] for ids in WITH_PREFIX]
    assert (again.bos_token_id, again.eos_token_id, again.unk_token_id) == (1, 2, 0)


def test_scores_that_do_not_fit_the_tokens(tmp_path: Path) -> None:
    header = read_header(vocabulary_file(tmp_path / "v.gguf"))
    header.metadata["tokenizer.ggml.scores"].pop()
    with pytest.raises(CheckpointError, match="320 tokens, 319 scores; the two must agree"):
        gguf_tokenizer(header)


def test_a_whole_model_takes_text(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", base_model(), Kind.F16, tokenizer="llama")
    with FlexiDepth.from_pretrained(path, num_threads=1) as llm:
        out = llm.generate("hello", max_new_tokens=2)
        assert out.prompt_ids == [1, 264]
        assert llm.generate([1, 264], max_new_tokens=2).token_ids == out.token_ids
