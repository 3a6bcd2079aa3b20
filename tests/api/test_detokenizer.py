"""The pieces of a stream are the whole text, for every kind of tokenizer and for bytes that are no text."""

from __future__ import annotations

import random

import pytest

from flexidepth.generation.detokenizer import Detokenizer

from .tokenizers import byte_tokenizer, fallback_tokenizer, metaspace_tokenizer

KINDS = {
    "byte-level": byte_tokenizer,
    "byte-fallback": fallback_tokenizer,
    "metaspace": metaspace_tokenizer,
}
TEXTS = ["日", "👩‍👩‍👧", "é", "ß", "\ufffd", "a\u0301"]


def pieces(tokenizer, ids, skip=True):
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(stream.push(i) for i in ids), stream.finish()]


def whole(tokenizer, ids, skip=True):
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)


def byte_ids(tokenizer, data):
    """Ids of bytes, one by one."""
    if tokenizer.convert_tokens_to_ids("<0x00>") not in (None, tokenizer.unk_token_id):
        return [tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in data]
    # A byte-level token is a character that stands for a byte, printable bytes for themselves.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    table = {value: chr(value) for value in plain}
    table |= {value: chr(256 + i) for i, value in enumerate(others)}
    return [tokenizer.convert_tokens_to_ids(table[value]) for value in data]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_stream_as_they_decode(kind, skip):
    tokenizer, draw = KINDS[kind](), random.Random(7)
    size = len(tokenizer)
    for _ in range(300):
        ids = []
        while len(ids) < 24:
            if kind != "metaspace" and draw.random() < 0.3:
                data = draw.choice(TEXTS).encode()
                # Whole, cut off, or with a wrong byte behind it.
                data = draw.choice([data, data[:-1], data + b"\x80"])
                ids += byte_ids(tokenizer, data)
            else:  # the words are the last ids, the byte tokens the first; beyond the end is no token
                ids.append(draw.choice([draw.randrange(size + 2), size - draw.randrange(1, 10)]))
        got = pieces(tokenizer, ids, skip)
        assert "".join(got) == whole(tokenizer, ids, skip), ids


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_a_character_split_over_tokens_comes_whole(kind):
    tokenizer = KINDS[kind]()
    (a,) = byte_ids(tokenizer, b"a") if kind == "byte-level" else tokenizer.encode("a")
    got = pieces(tokenizer, [a, *byte_ids(tokenizer, "👍".encode()), a])
    assert [p for p in got if p] in (["a", "👍", "a"], ["a", "👍a"])


def test_a_run_of_bytes_with_a_wrong_one_is_wrong_as_a_whole():
    tokenizer = fallback_tokenizer()
    ids = [*byte_ids(tokenizer, "日".encode() + b"\x80"), *tokenizer.encode("a")]
    assert pieces(tokenizer, ids) == ["", "", "", "", "\ufffd" * 4 + "a", ""]


def test_spaces_are_kept_but_for_the_first():
    tokenizer = fallback_tokenizer()
    space, hello, the = (
        tokenizer.convert_tokens_to_ids(t) for t in ("\u2581", "\u2581hello", "\u2581the")
    )
    assert pieces(tokenizer, [hello, the, space, the]) == ["hello", " the", " ", " the", ""]
    assert pieces(tokenizer, [space, hello]) == ["", " hello", ""]
    # Tokens without text are no beginning of the text.
    (empty,) = tokenizer.convert_tokens_to_ids([""])
    assert pieces(tokenizer, [the, empty, hello]) == ["the", "", " hello", ""]
    assert pieces(tokenizer, [the, 1, hello]) == ["the", "", " hello", ""]


def test_a_slow_tokenizer_streams_too():
    class Slow:
        """What transformers' tokenizers without a `backend_tokenizer` offer."""

        all_special_ids = (1,)
        words = ("x", "<s>", "y")

        def convert_ids_to_tokens(self, token_id):
            return self.words[token_id] if token_id < len(self.words) else None

        def decode(self, ids, **_):
            return "".join(self.words[i] for i in ids)

    assert pieces(Slow(), [0, 1, 2]) == ["x", "", "y", ""]
    assert pieces(Slow(), [0, 1, 2], skip=False) == ["x", "<s>", "y", ""]


def test_only_a_window_is_decoded():
    tokenizer = fallback_tokenizer()
    hello = tokenizer.convert_tokens_to_ids("\u2581hello")
    stream = Detokenizer(tokenizer, skip_special_tokens=True)
    for _ in range(50):
        stream.push(hello)
    assert len(stream._window) == 1
