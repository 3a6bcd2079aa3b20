"""stream(): whole characters, no leaking stop strings, and an end that really ends."""

from __future__ import annotations

import threading

import pytest

from flexidepth.errors import EngineBusyError, ValueOutOfRangeError
from flexidepth.generation.text import TextStream

from .conftest import EOS, script
from .tokenizers import byte_tokenizer, fallback_tokenizer

PROMPT = [5, 60, 7]


def chunks(llm, **arguments):
    return list(llm.stream(PROMPT, **{"max_new_tokens": 60, **arguments}))


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "naïve café",
        "日本語のテキスト",
        "👩‍👩‍👧 family",
        "a\u0301 combining",
        "mixed é日👍 end",
    ],
)
def test_no_chunk_holds_half_a_character(llm, text):
    script(llm, text)
    got = chunks(llm)
    assert "".join(c.text for c in got) == text == got[-1].output.text
    assert not any("\ufffd" in c.text for c in got)
    assert got[-1].finish_reason == "eos" and got[-1].token_id == EOS
    assert all(c.finish_reason is None and c.output is None for c in got[:-1])


def test_broken_bytes_come_out_as_a_plain_decode_shows_them(llm):
    script(llm, b"ab\xe6\x97", eos=True)
    got = chunks(llm)
    assert got[-1].output.text.startswith("ab") and "\ufffd" in got[-1].output.text


@pytest.mark.parametrize(
    ("text", "stops", "want", "reason"),
    [
        ("hello STOP world", "STOP", "hello ", "stop"),
        ("hello STO world", "STOP", "hello STO world", "eos"),
        ("aaab", "aab", "a", "stop"),
        ("one two three", ["three", "two"], "one ", "stop"),
        ("ends with ST", "STOP", "ends with ST", "eos"),
        ("日本語", "本", "日", "stop"),
        ("STOP", "STOP", "", "stop"),
    ],
)
def test_stop_strings_never_leak(llm, text, stops, want, reason):
    script(llm, text)
    seen = ""
    for chunk in llm.stream(PROMPT, max_new_tokens=60, stop_strings=stops):
        seen += chunk.text
        assert want.startswith(seen)  # nothing of a stop string, not even for a moment
    assert seen == want == chunk.output.text
    assert chunk.finish_reason == reason


def test_length_flushes_what_was_held_back(llm):
    script(llm, "abcST", eos=False)
    got = chunks(llm, max_new_tokens=5, stop_strings="STOP")
    assert got[-1].finish_reason == "length" and got[-1].output.text == "abcST"


def test_special_tokens_are_left_out_unless_asked_for():
    for skip, want in ((True, "ab"), (False, "a<s>b")):
        tokenizer = byte_tokenizer()
        stream = TextStream(tokenizer, (), skip)
        text = (
            "".join(stream.push(i) for i in (*tokenizer.encode("a"), 256, *tokenizer.encode("b")))
            + stream.finish()
        )
        assert text == want


def test_byte_fallback_tokenizers_stream_even_what_is_no_text():
    tokenizer = fallback_tokenizer()
    character = ["<0xF0>", "<0x9F>", "<0x91>", "<0x8D>"]
    tokens = [*character, "\u2581hello", *character, "<0xFF>", "\u2581the", "<0xFF>"]
    stream = TextStream(tokenizer, ("STOP",), True)
    text = "".join(stream.push(tokenizer.convert_tokens_to_ids(t)) for t in tokens)
    assert text == "👍 hello" + "\ufffd" * 5 + " the"
    assert stream.finish() == "\ufffd" and stream.text == text + "\ufffd"


def test_stream_equals_generate(llm):
    got = chunks(llm, temperature=1.0, seed=3)
    out = llm.generate(PROMPT, max_new_tokens=60, temperature=1.0, seed=3)
    assert [c.token_id for c in got] == out.token_ids
    assert got[-1].output.text == out.text == "".join(c.text for c in got)
    assert all(1 <= c.layers_used <= 4 for c in got)


def test_closing_the_iterator_stops_the_work(llm):
    passes = 0
    forward = llm.engine.forward

    def counted(*args, **kwargs):
        nonlocal passes
        passes += 1
        return forward(*args, **kwargs)

    llm.engine.forward = counted
    stream = llm.stream(PROMPT, max_new_tokens=50, eos_token_id=-1)
    next(stream)
    with pytest.raises(EngineBusyError, match="another generation is running"):
        llm.generate(PROMPT)
    stream.close()
    assert passes == 1
    assert llm.generate(PROMPT, max_new_tokens=2).token_ids


def test_another_thread_gets_an_error_not_a_hang(llm):
    stream = llm.stream(PROMPT, max_new_tokens=50, eos_token_id=-1)
    next(stream)
    errors = []

    def other():
        try:
            llm.generate(PROMPT)
        except EngineBusyError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive() and len(errors) == 1
    assert len(list(stream)) == 49


@pytest.mark.parametrize("at", [1, 2, 3, 7])
def test_ctrl_c_between_steps_leaves_everything_usable(llm, at):
    want = llm.generate(PROMPT * 20, max_new_tokens=6, eos_token_id=-1).token_ids
    forward, count = llm.engine.forward, 0

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        result = forward(*args, **kwargs)
        if count == at:
            raise KeyboardInterrupt
        return result

    cache = llm.new_cache()
    llm.engine.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPT * 20, max_new_tokens=20, eos_token_id=-1, cache=cache)
    llm.engine.forward = forward
    assert (
        llm.generate(PROMPT * 20, max_new_tokens=6, eos_token_id=-1, cache=cache).token_ids == want
    )


def test_one_prompt_at_a_time(llm):
    with pytest.raises(ValueOutOfRangeError, match="one prompt and one answer"):
        next(llm.stream([PROMPT, PROMPT]))
