"""Arguments of every type: numpy's and torch's numbers are numbers, everything else is refused by name and value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from flexidepth.errors import ShapeError, UnsupportedError, ValueOutOfRangeError
from flexidepth.generation.params import GenerationParams
from flexidepth.llm import FlexiDepth

from .conftest import EOS

PROMPT = [5, 60, 7]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", "5"),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", True),
        ("max_new_tokens", None),
        ("num_return_sequences", "2"),
        ("top_k", 1.5),
        ("top_k", [1]),
        ("logprobs", 1.0),
        ("logprobs", 10**6),
        ("temperature", "0.7"),
        ("temperature", float("nan")),
        ("top_p", "x"),
        ("min_p", [0.1]),
        ("repetition_penalty", True),
        ("seed", "x"),
        ("seed", 1.5),
        ("seed", 1 << 64),
        ("stop_strings", 3),
        ("stop_strings", [3]),
        ("stop_strings", b"x"),
        ("eos_token_id", "x"),
        ("eos_token_id", 10**7),
        ("eos_token_id", [1, 10**7]),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", -2),
        ("do_sample", "no"),
        ("skip_special_tokens", None),
        ("logits_processor", 3),
        ("logits_processor", [None]),
        ("stopping_criteria", "stop"),
        ("routing_seed", "x"),
        ("routing_seed", 0.5),
        ("cache", 3),
    ],
)
def test_wrong_types_and_values(llm, name, value):
    with pytest.raises(ValueOutOfRangeError, match=f"{name} is .*wanted "):
        llm.generate(PROMPT, **{"max_new_tokens": 2, name: value})
    assert llm.generate(PROMPT, max_new_tokens=2).token_ids  # still usable


def test_none_is_off():
    off = GenerationParams(seed=1)
    names = ["top_k", "top_p", "min_p", "repetition_penalty", "stop_strings"]
    names += ["logits_processor", "stopping_criteria"]
    assert GenerationParams(seed=1, **dict.fromkeys(names)) == off


def test_numbers_of_numpy_and_torch(llm):
    plain = llm.generate(PROMPT, max_new_tokens=6, temperature=0.5, top_p=0.5, seed=3, top_k=9)
    other = llm.generate(
        np.array(PROMPT), max_new_tokens=np.int64(6), temperature=np.float32(0.5),
        top_p=torch.tensor(0.5), seed=torch.tensor(3), top_k=np.uint8(9),
    )  # fmt: skip
    assert other.token_ids == plain.token_ids
    # More tokens than there are, and more than 64 bits count: all of them.
    several = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    assert (
        llm.generate(PROMPT, top_k=10**20, **several).token_ids
        == llm.generate(PROMPT, **several).token_ids
    )


@pytest.mark.parametrize(
    "tau", [np.float32(0.25), np.array([0.25] * 3), torch.tensor([0.25] * 3), torch.tensor(0.25)]
)
def test_thresholds_of_any_number_type(llm, tau):
    want = llm.generate(PROMPT, max_new_tokens=6, skip_threshold=0.25)
    got = llm.generate(PROMPT, max_new_tokens=6, skip_threshold=tau)
    assert got.token_ids == want.token_ids
    assert got.metrics.mean_layers_used == want.metrics.mean_layers_used


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        ("x", "skip_threshold: 'x'; wanted a number"),
        ("0.5", "skip_threshold: '0.5'; wanted a number"),
        (True, "skip_threshold: True; wanted a number"),
        ([0.5, "x", 0.5], "value 1 is 'x'"),
        ([0.5, None, 0.5], "value 1 is None"),
    ],
)
def test_thresholds_that_are_no_numbers(llm, tau, message):
    for call in (llm.generate, llm.score):
        with pytest.raises(ValueOutOfRangeError, match=message):
            call(PROMPT, skip_threshold=tau)


@pytest.mark.parametrize(
    "prompt",
    [
        [np.int64(5), np.int64(60), np.int64(7)],
        [torch.tensor(i) for i in PROMPT],
        np.array(PROMPT),
        torch.tensor(PROMPT),
        tuple(PROMPT),
        range(5, 6),
    ],
)
def test_token_ids_of_any_integer_type(llm, prompt):
    want = PROMPT if len(prompt) == 3 else [5]
    out = llm.generate(prompt, max_new_tokens=2)
    assert out.prompt_ids == want and all(type(i) is int for i in out.prompt_ids)
    assert [o.prompt_ids for o in llm.generate([prompt, prompt], max_new_tokens=1)] == [want, want]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "the prompt is None; wanted a text"),
        (3, "the prompt is 3; wanted a text"),
        (b"hi", "the prompt is b'hi'; wanted a text"),
        (["hi", None], "the prompt is None; wanted a text"),
        ({"role": "user", "content": "hi"}, r"wanted a text.*give \[message\], a list"),
        ({"input_ids": [1, 2]}, r"give \['input_ids'\] of it"),
        ([1, 1.7], "token id 1.7 at position 1"),
        ([1, "7"], "token id '7' at position 1"),
        ([1, True], "token id True at position 1"),
        ([1, None], "token id None at position 1"),
        ([np.bool_(True)], "position 0; the vocabulary"),
        (torch.tensor([1.0, 2.0]), "token id 1.0 at position 0"),
        ([{"role": "user", "content": None}], "'content': None}; wanted"),
        ([{"role": 1, "content": "hi"}], "'role': 1, .*; wanted"),
        ([{"role": "user", "content": "hi"}, "hi"], "message 'hi'; wanted"),
    ],
)
def test_what_is_no_prompt(llm, prompt, message):
    for call in (llm.generate, llm.score):
        with pytest.raises(ValueOutOfRangeError, match=message):
            call(prompt)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_a_table_is_no_prompt_but_its_rows_are(llm, make):
    table = make([PROMPT, PROMPT])
    with pytest.raises(ShapeError, match=r"\[2, 3\]; wanted one dimension.*list\(prompt\)"):
        llm.generate(table)
    assert [o.prompt_ids for o in llm.generate(list(table), max_new_tokens=1)] == [PROMPT, PROMPT]


def test_one_callable_or_a_list(llm):
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    settings = {"max_new_tokens": 12, "eos_token_id": -1}
    want = llm.generate(PROMPT, logits_processor=[processor], **settings).token_ids
    assert want != llm.generate(PROMPT, **settings).token_ids
    for given in (processor, LogitsProcessorList([processor])):
        assert llm.generate(PROMPT, logits_processor=given, **settings).token_ids == want
    out = llm.generate(PROMPT, stopping_criteria=lambda ids, _: ids.shape[1] > 5, **settings)
    assert out.finish_reason == "stopped" and len(out.token_ids) == 3
    assert len(llm.generate(PROMPT, stopping_criteria=lambda *_: None, **settings).token_ids) == 12


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned None; wanted scores"),
        (torch.zeros(258), r"returned \[258\]"),
        (torch.zeros(1, 7), r"returned \[1, 7\]"),
    ],
)
def test_what_a_processor_returns_is_checked(llm, result, message):
    def processor(ids, scores):
        return result

    with pytest.raises(ShapeError, match=rf"logits_processor 'processor' {message}"):
        llm.generate(PROMPT, logits_processor=processor)


def test_no_end_token_at_all(llm):
    for none in (-1, [], (), [-1], np.int64(-1)):
        out = llm.generate(PROMPT, max_new_tokens=60, eos_token_id=none)
        assert out.finish_reason == "length" and len(out.token_ids) == 60
    first = llm.generate(PROMPT, max_new_tokens=1).token_ids
    for given in (first[0], [EOS, first[0]], np.array(first)[0]):
        assert llm.generate(PROMPT, eos_token_id=given).finish_reason == "eos"


def test_stop_strings_need_a_tokenizer(llm):
    bare = FlexiDepth(llm.engine, llm.config, None, routers_trained=True, source="test")
    with pytest.raises(UnsupportedError, match=r"stop_strings is \('x',\), .* without a tokenizer"):
        bare.generate(PROMPT, stop_strings="x")


@pytest.mark.parametrize("bad", [0, -5, 10**6, 2.0, "8"])
def test_bad_lengths(llm, bad):
    with pytest.raises(
        ValueOutOfRangeError, match=r"max_length is .*; wanted a whole number, 1 to 1024"
    ):
        llm.new_cache(bad)
    with pytest.raises(ValueOutOfRangeError, match=r"max_length is .*; wanted"):
        FlexiDepth(
            llm.engine, llm.config, None, routers_trained=True, source="test", max_length=bad
        )


def test_lengths(llm):
    assert llm.new_cache().kv.max_length == llm.max_length == 1024
    assert llm.new_cache(np.int64(9)).kv.max_length == 9
