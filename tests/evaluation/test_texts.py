"""Reading held-out texts: windows, calibration, prompts, bad files."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexidepth.errors import DataError, UnsupportedError, ValueOutOfRangeError
from flexidepth.evaluation.texts import read_text_set
from flexidepth.training.calibration_text import TokenSequence
from tests.api.tokenizers import byte_tokenizer

from .conftest import sentence, write_lines


def cut(window: TokenSequence, tokens: int) -> TokenSequence:
    return TokenSequence(window.ids[:tokens], window.counted[:tokens])


def test_windows_hold_the_documents_one_behind_the_other(prose: Path) -> None:
    tokenizer = byte_tokenizer()
    text_set = read_text_set("prose", prose, tokenizer, tokens=250, window=100)
    assert [len(window.ids) for window in text_set.windows] == [100, 100, 50]
    assert text_set.predictions == 247
    text = tokenizer.decode([token for window in text_set.windows for token in window.ids])
    whole, _ = text.rsplit("\n\n", 1)
    known = {sentence(i) for i in range(40)}
    assert whole.split("\n\n") and set(whole.split("\n\n")) <= known


def test_the_order_is_shuffled_and_always_the_same(prose: Path) -> None:
    tokenizer = byte_tokenizer()

    def read(seed: int) -> list[list[int]]:
        found = read_text_set("x", prose, tokenizer, tokens=200, window=100, seed=seed).windows
        return [window.ids for window in found]

    assert read(0) == read(0) != read(1)
    first, second = (tokenizer.decode(read(seed)[0]).split()[0] for seed in (0, 1))
    assert first != second


def test_calibration_is_the_text_behind_the_measured_part(prose: Path) -> None:
    tokenizer = byte_tokenizer()
    longer = read_text_set("x", prose, tokenizer, tokens=500, window=100)
    split = read_text_set("x", prose, tokenizer, tokens=300, window=100, calibration_tokens=150)
    assert split.windows == longer.windows[:3]
    assert split.calibration == [longer.windows[3], cut(longer.windows[4], 50)]
    short = read_text_set("x", prose, tokenizer, tokens=10**6, window=100, calibration_tokens=150)
    assert short.calibration == []


def test_a_window_begins_with_bos_where_texts_do(prose: Path) -> None:
    plain = read_text_set("x", prose, byte_tokenizer(), tokens=99, window=99)
    with_bos = read_text_set("x", prose, byte_tokenizer(adds_bos=True), tokens=200, window=100)
    assert [len(window.ids) for window in with_bos.windows] == [100, 100]
    assert with_bos.windows[0].ids == [256, *plain.windows[0].ids]
    assert 256 not in with_bos.windows[1].ids[1:] and with_bos.windows[1].ids[0] == 256


def test_conversations_go_through_the_template(chat: Path) -> None:
    tokenizer = byte_tokenizer()
    text_set = read_text_set("chat", chat, tokenizer, tokens=400, window=400, num_prompts=3)
    text = tokenizer.decode(text_set.windows[0].ids)
    assert text.startswith("<s>user\n") and "<s>assistant\n" in text
    assert len(text_set.prompts) == 3
    assert all(len(prompt) == 1 and prompt[0]["role"] == "user" for prompt in text_set.prompts)
    assert text_set.prompts[0][0]["content"] in text
    with pytest.raises(UnsupportedError, match=r"chat\.jsonl, line \d+ is a conversation"):
        read_text_set("chat", chat, byte_tokenizer(None), tokens=400, window=400)


def test_of_conversations_the_answers_count(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    talks = [{"question": f"what is {i}?", "answer": f"number {i}"} for i in range(10)]
    path = write_lines(tmp_path / "a.jsonl", [*talks, {"text": "plain"}])
    text_set = read_text_set("a", path, tokenizer, tokens=10**4, window=60)
    assert [len(window.counted) for window in text_set.windows] == [
        len(window.ids) for window in text_set.windows
    ]
    tokens = [pair for window in text_set.windows for pair in zip(*window, strict=True)]
    said = tokenizer.decode([token for token, counted in tokens if counted])
    for i in range(10):
        assert said.count(f"number {i}</s>") == 1
    assert said.count("plain") == 1 and "what" not in said and "assistant" not in said


def test_questions_without_an_answer_are_not_measured(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "long " * 20, "answer": "x"}])
    with pytest.raises(
        ValueOutOfRangeError, match="no answer of a conversation among its first 30"
    ):
        read_text_set("a", path, byte_tokenizer(), tokens=30, window=90)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "wanted an object"),
        ('{"texts": "a"}', "line 1: .*texts.*wanted"),
        ('{"messages": [{"role": "user"}]}', "line 1: message 0: content"),
        ("", "line 1: empty"),
        ('{"text": 3}', "line 1: text is a int"),
    ],
)
def test_lines_that_are_no_text(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=rf"bad\.jsonl.*{message}"):
        read_text_set("bad", path, byte_tokenizer(), tokens=10, window=10)


def test_questions_with_answers_are_conversations(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"question": "abc", "answer": "de"}])
    text_set = read_text_set("a", path, byte_tokenizer(), tokens=90, window=90, num_prompts=1)
    assert text_set.prompts == [[{"role": "user", "content": "abc"}]]
    assert "abc</s><s>assistant\nde" in byte_tokenizer().decode(text_set.windows[0].ids)


def test_a_window_of_one_token_predicts_nothing(prose: Path) -> None:
    with pytest.raises(ValueOutOfRangeError, match="no text of two tokens or more"):
        read_text_set("a", prose, byte_tokenizer(), tokens=1, window=90)
