"""Chat templates, conversations, cache reuse, routing reports."""

from __future__ import annotations

import math

import pytest
import torch

from flexidepth.errors import CheckpointError, ValueOutOfRangeError
from flexidepth.llm import FlexiDepth
from flexidepth.routing import RoutingReport, resolve_force_routing, skip_ratio_mask
from flexidepth_ext.engine import Engine

from ..engine.conftest import weights_of
from .conftest import BOS, script
from .tokenizers import byte_tokenizer

PROMPT = [5, 60, 7, 99, 12, 31, 8, 77]


def test_chat_template_without_a_double_bos(llm):
    # A tokenizer that adds BOS to every text must not add it to what the template has written.
    llm.tokenizer = byte_tokenizer(adds_bos=True)
    assert llm.generate("hi", max_new_tokens=1).prompt_ids[0] == BOS
    out = llm.generate([{"role": "user", "content": "hi"}], max_new_tokens=1)
    assert llm.tokenizer.decode(out.prompt_ids) == "<s>user\nhi</s><s>assistant\n"
    assert out.prompt_ids.count(BOS) == 2


@pytest.mark.parametrize("bad", [{"role": "user"}, {"content": "x"}])
def test_bad_messages(llm, bad):
    with pytest.raises(ValueOutOfRangeError, match=r"wanted \{'role'"):
        llm.generate([bad])


def test_a_conversation_reuses_its_cache_and_changes_nothing(llm):
    chat = llm.chat("be brief", max_new_tokens=8, temperature=0)
    first, second = chat.send("one"), chat.send("two")
    assert first.metrics.cached_tokens == 0
    # All of the first turn but its last token, which was chosen and never computed.
    shared = len(first.prompt_ids) + len(first.token_ids) - 1
    assert 0.5 * shared < second.metrics.cached_tokens <= shared
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "two"},
    ]
    fresh = llm.generate(messages, max_new_tokens=8, temperature=0)
    assert fresh.prompt_ids == second.prompt_ids and fresh.token_ids == second.token_ids
    chat.reset()
    assert chat.send("one").token_ids == first.token_ids and len(chat.messages) == 3


def test_a_stream_broken_off_stays_in_the_history(llm):
    chat = llm.chat(max_new_tokens=30)
    script(llm, "a long answer")
    stream = chat.stream("hi")
    for _ in range(6):
        next(stream)
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "a long"}


def test_ctrl_c_keeps_what_came_and_drops_a_turn_without_a_word(llm):
    chat = llm.chat(max_new_tokens=30, eos_token_id=-1)
    forward, count = llm.engine.forward, 0

    def interrupted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    script(llm, "abcdefgh")
    llm.engine.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream("hi"))
    assert chat.messages[-1] == {"role": "assistant", "content": "ab"}
    before, count = list(chat.messages), 2
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream("again"))
    assert chat.messages == before


@pytest.mark.parametrize("at", [1, 4])
def test_a_turn_that_fails_is_no_turn(llm, at):
    chat = llm.chat(max_new_tokens=30)
    script(llm, "fine")
    list(chat.stream("hi"))
    before = list(chat.messages)
    assert before[-1] == {"role": "assistant", "content": "fine"}
    calls = 0

    def broken(_, scores):
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("no scores")
        return scores

    script(llm, "a long answer")
    for turn in (lambda: list(chat.stream("one", logits_processor=[broken])),
                 lambda: chat.send("one", logits_processor=[broken])):  # fmt: skip
        calls = 0
        with pytest.raises(RuntimeError, match="no scores"):
            turn()
        assert chat.messages == before
    with pytest.raises(ValueOutOfRangeError, match="max_new_tokens is 0"):
        list(chat.stream("one", max_new_tokens=0))
    assert chat.messages == before
    script(llm, "")
    list(chat.stream("no answer is an answer"))
    assert chat.messages[len(before) :][-1] == {"role": "assistant", "content": ""}


def test_a_turn_is_a_text(llm):
    message = {"role": "user", "content": "hi"}
    for make in (
        lambda: llm.chat(message),
        lambda: llm.chat().send(message),
        lambda: next(llm.chat().stream(None)),
    ):
        with pytest.raises(ValueOutOfRangeError, match="wanted a text; give the content alone"):
            make()


def test_another_model_s_cache_is_refused(llm, model):
    cache = llm.new_cache()
    llm.generate(PROMPT, cache=cache, max_new_tokens=2)
    held = cache.length
    with FlexiDepth(
        Engine(model.config, weights_of(model), dtype=torch.float32), model.config, byte_tokenizer(),
        routers_trained=True, source="other",
    ) as other:  # fmt: skip
        for call in (other.generate, lambda *a, **k: next(other.stream(*a, **k))):
            with pytest.raises(
                ValueOutOfRangeError, match=rf"with {held} tokens\) was made by another model"
            ):
                call(PROMPT, cache=cache)
    assert cache.length == held
    assert llm.generate(PROMPT, cache=cache, max_new_tokens=2).metrics.cached_tokens == 7


def test_a_cache_is_reused_under_the_same_thresholds_only(llm):
    cache = llm.new_cache()
    for thresholds, cached in (
        (0.9, 0),
        (0.9, 7),
        (0.1, 0),
        ([0.1, 0.1, 0.1], 7),
        ([0.1, 0.1, 0.9], 0),
        (None, 0),
    ):
        out = llm.generate(PROMPT, cache=cache, max_new_tokens=6, skip_threshold=thresholds)
        assert out.metrics.cached_tokens == cached
        fresh = llm.generate(PROMPT, max_new_tokens=6, skip_threshold=thresholds)
        assert out.token_ids == fresh.token_ids


def test_cache_keeps_the_common_prefix_only(llm):
    cache = llm.new_cache(64)
    llm.generate(PROMPT, cache=cache, max_new_tokens=3, eos_token_id=-1)
    assert cache.length == 10 and cache.token_ids[:8] == PROMPT and cache.nbytes > 0
    other = [*PROMPT[:5], 200, 201]
    out = llm.generate(other, cache=cache, max_new_tokens=4)
    assert out.metrics.cached_tokens == 5
    assert out.token_ids == llm.generate(other, max_new_tokens=4).token_ids
    # Under another routing the same tokens have other keys and values.
    forced = llm.generate(other, cache=cache, max_new_tokens=4, force_routing="none")
    assert forced.metrics.cached_tokens == 0
    assert forced.token_ids == llm.generate(other, max_new_tokens=4, force_routing="none").token_ids


def test_one_cache_one_sequence(llm):
    cache = llm.new_cache(16)
    with pytest.raises(ValueOutOfRangeError, match="a cache holds one sequence"):
        llm.generate([PROMPT, PROMPT], cache=cache)
    with pytest.raises(ValueOutOfRangeError, match="do not fit 16 positions"):
        llm.generate(PROMPT, cache=cache, max_new_tokens=20)


def test_report_and_its_replay(llm):
    out = llm.generate(PROMPT, max_new_tokens=10, eos_token_id=-1, return_routing=True)
    report = out.routing
    assert report.ran.shape == report.gates.shape == (17, 3) and report.prompt_length == 8
    assert torch.equal(report.ran.bool(), report.gates > 0.5)
    assert report.layers_used == [1 + int(n) for n in report.ran.sum(1)]
    assert report.mean_layers_used == pytest.approx(out.metrics.mean_layers_used)
    assert report.skip_rate[2] == pytest.approx(1 - report.ran[:, 1].float().mean().item())
    again = RoutingReport.from_json(report.to_json())
    assert again.tokens == report.tokens and torch.equal(again.ran, report.ran)
    torch.testing.assert_close(again.gates, report.gates, rtol=0, atol=1e-6)
    replay = llm.generate(
        PROMPT, max_new_tokens=10, eos_token_id=-1, force_routing=report.mask(), return_routing=True
    )
    assert replay.token_ids == out.token_ids and torch.equal(replay.routing.ran, report.ran)
    assert llm.generate(PROMPT, max_new_tokens=2).routing is None


def test_dense_reports_nan_and_survives_json(llm):
    report = llm.generate(
        PROMPT, max_new_tokens=2, force_routing="dense", return_routing=True
    ).routing
    assert (
        report.gates.isnan().all() and RoutingReport.from_json(report.to_json()).gates.isnan().all()
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "not json"])
def test_not_a_report(text):
    with pytest.raises(CheckpointError, match="not a routing report"):
        RoutingReport.from_json(text)


@pytest.mark.parametrize("skipped", [0, 1, 7, 15])
def test_skip_ratio_masks_are_exact_and_positional(skipped):
    mask = skip_ratio_mask(skipped, 3, 0, 400, 15)
    assert ((mask == 0).sum(1) == skipped).all()
    assert torch.equal(skip_ratio_mask(skipped, 3, 123, 125, 15), mask[123:125])
    if 0 < skipped < 15:
        assert not torch.equal(skip_ratio_mask(skipped, 4, 0, 400, 15), mask)
        # Every layer gets its share: a binomial of 400 draws stays within five deviations.
        share, deviation = skipped / 15, math.sqrt(400 * skipped / 15 * (1 - skipped / 15))
        assert ((mask == 0).sum(0) - 400 * share).abs().max() < 5 * deviation


def test_ratio_rounds_to_whole_layers(llm):
    assert resolve_force_routing(0.5, llm.config).num_skipped == 2
    assert resolve_force_routing(0, llm.config).num_skipped == 0
    assert resolve_force_routing(1, llm.config).num_skipped == 3
