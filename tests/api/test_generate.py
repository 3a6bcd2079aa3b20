"""generate(): the reference's tokens, batches, seeds, limits, arguments."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from flexidepth.errors import EngineClosedError, ShapeError, UnsupportedError, ValueOutOfRangeError
from flexidepth.generation.loop import sequence_seed
from flexidepth.llm import FlexiDepth

from .conftest import EOS, VOCAB
from .tokenizers import byte_tokenizer

PROMPT = [5, 60, 7, 99, 12, 31, 8, 77]


def reference_tokens(model, prompt, n, **kwargs):
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=n, pad_token_id=0, eos_token_id=EOS, **kwargs
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("force", [None, "all", "none", "dense", [2], 0.34])
def test_greedy_equals_the_reference(llm, model, force):
    want = reference_tokens(model, PROMPT, 40, do_sample=False, force_routing=force)
    out = llm.generate(PROMPT, max_new_tokens=40, force_routing=force, routing_seed=0)
    assert out.token_ids == want
    assert out.finish_reason == ("eos" if want[-1] == EOS else "length")


def test_repetition_penalty_equals_transformers(llm, model):
    want = reference_tokens(model, PROMPT, 30, do_sample=False, repetition_penalty=1.7)
    assert llm.generate(PROMPT, max_new_tokens=30, repetition_penalty=1.7).token_ids == want
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    assert llm.generate(PROMPT, max_new_tokens=30, logits_processor=[processor]).token_ids == want
    assert llm.generate(PROMPT, max_new_tokens=30).token_ids != want


def test_long_prompts_go_in_chunks(llm, model):
    prompt = torch.randint(1, 256, (150,)).tolist()  # the engine takes 32 rows at once
    assert llm.generate(prompt, max_new_tokens=8).token_ids == reference_tokens(
        model, prompt, 8, do_sample=False
    )


def test_a_batch_gives_the_answers_of_its_members(llm):
    prompts = [
        torch.randint(0, 256, (n,)).tolist() for n in (3, 40, 1, 9, 17, 2, 5, 4, 6, 8)
    ]  # more than 8
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5, "force_routing": 0.34}
    together = llm.generate(prompts, **settings)
    for prompt, out in zip(prompts, together, strict=True):
        assert out.token_ids == llm.generate(prompt, **settings).token_ids
    assert isinstance(llm.generate([prompts[0]], max_new_tokens=1), list)


def test_a_seed_for_each_prompt(llm):
    prompts = [PROMPT, PROMPT, PROMPT[:3]]
    settings = {"max_new_tokens": 12, "temperature": 1.0, "eos_token_id": -1}
    together = llm.generate(prompts, seeds=[1, 2, -7], **settings)
    for prompt, seed, out in zip(prompts, (1, 2, -7), together, strict=True):
        alone = llm.generate(prompt, seed=seed, **settings)
        assert (out.token_ids, out.seed) == (alone.token_ids, seed)
    assert together[0].token_ids != together[1].token_ids
    twice = llm.generate(prompts, seeds=[1, 2, -7], num_return_sequences=2, **settings)
    assert [out.token_ids for out in twice[::2]] == [out.token_ids for out in together]
    assert [out.seed for out in twice] == [1, 1, 2, 2, -7, -7]
    for seeds, problem in (([1, 2], "seeds is .* wanted 3"), ([1, 2, 0.5], r"seeds\[2\] is 0.5")):
        with pytest.raises(ValueOutOfRangeError, match=problem):
            llm.generate(prompts, seeds=seeds, **settings)


def test_seeds_and_returned_sequences(llm):
    settings = {"max_new_tokens": 16, "temperature": 1.0}
    first = llm.generate(PROMPT, seed=1, **settings)
    assert llm.generate(PROMPT, seed=1, **settings).token_ids == first.token_ids
    assert llm.generate(PROMPT, seed=2, **settings).token_ids != first.token_ids
    several = llm.generate(PROMPT, seed=1, num_return_sequences=3, return_routing=True, **settings)
    assert several[0].token_ids == first.token_ids
    assert len({tuple(out.token_ids) for out in several}) == 3
    for out in several:  # the prompt's report is there, though it was computed once
        assert len(out.routing.tokens) == len(PROMPT) + len(out.token_ids) - 1
    random = llm.generate(PROMPT, **settings)
    assert llm.generate(PROMPT, seed=random.seed, **settings).token_ids == random.token_ids


def test_more_answers_than_go_in_one_batch(llm):
    # The ninth and tenth copy a prompt whose first answer is there already.
    settings = {"max_new_tokens": 7, "temperature": 1.0, "eos_token_id": -1}
    several = llm.generate(PROMPT, seed=1, num_return_sequences=10, **settings)
    for which, out in enumerate(several):
        seed = sequence_seed(1, which)
        assert llm.generate(PROMPT, seed=seed, **settings).token_ids == out.token_ids


@pytest.mark.parametrize(
    ("prompts", "count", "most"),
    # One group of sequences at a time; with several answers also the prompt that is still to be copied.
    [(20, 1, 8), (3, 3, 9), (2, 10, 9)],
)
def test_a_batch_holds_no_more_caches_than_it_works_on(llm, monkeypatch, prompts, count, most):
    made, peaks = [], []
    new_cache, forward = llm.engine.new_cache, llm.engine.forward
    monkeypatch.setattr(
        llm.engine, "new_cache", lambda n: made.append(new_cache(n)) or made[-1], raising=False
    )

    def watched(*args, **kwargs):
        result = forward(*args, **kwargs)
        peaks.append(sum(kv.nbytes > 0 for kv in made))
        return result

    monkeypatch.setattr(llm.engine, "forward", watched)
    asked = [[i + 1, *PROMPT] for i in range(prompts)]
    settings = {"max_new_tokens": 4, "eos_token_id": -1, "temperature": 1.0, "seed": 3}
    outputs = llm.generate(asked, num_return_sequences=count, **settings)
    assert len(made) == prompts * count and max(peaks) <= most
    assert all(kv.nbytes == 0 for kv in made)
    for prompt, out in zip(asked, outputs[::count], strict=True):
        assert llm.generate(prompt, **settings).token_ids == out.token_ids


def test_a_given_cache_stays_filled(llm):
    cache = llm.new_cache()
    llm.generate(PROMPT, cache=cache, max_new_tokens=3, eos_token_id=-1)
    assert cache.length == len(PROMPT) + 2 and cache.nbytes > 0


def test_do_sample_follows_temperature(llm):
    greedy = llm.generate(PROMPT, max_new_tokens=10).token_ids
    assert llm.generate(PROMPT, max_new_tokens=10, temperature=0).token_ids == greedy
    assert (
        llm.generate(PROMPT, max_new_tokens=10, do_sample=False, temperature=0.9).token_ids
        == greedy
    )
    assert llm.generate(PROMPT, max_new_tokens=10, do_sample=True, top_k=1).token_ids == greedy


def test_logprobs(llm, model):
    out = llm.generate(PROMPT, max_new_tokens=5, logprobs=3)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + out.token_ids])).logits[0, len(PROMPT) - 1 : -1]
    table = logits.log_softmax(-1)
    torch.testing.assert_close(
        torch.tensor(out.logprobs), table.max(-1).values, rtol=1e-4, atol=1e-4
    )
    for row, pairs in zip(table, out.top_logprobs, strict=True):
        assert [t for t, _ in pairs] == row.topk(3).indices.tolist()
    assert llm.generate(PROMPT, max_new_tokens=5).logprobs is None


def test_criteria_and_callbacks(llm):
    seen = []
    out = llm.generate(
        PROMPT, max_new_tokens=30, stopping_criteria=[lambda ids, _: ids.shape[1] >= len(PROMPT) + 4],
        on_token=lambda event: seen.append(event.token_id),
    )  # fmt: skip
    assert out.finish_reason == "stopped" and len(out.token_ids) == 4 and seen == out.token_ids


def test_metrics(llm):
    out = llm.generate(PROMPT, max_new_tokens=6, force_routing="none")
    m = out.metrics
    assert (m.prompt_tokens, m.cached_tokens, m.new_tokens) == (8, 0, len(out.token_ids))
    assert 0 < m.prefill_s <= m.ttft_s and m.decode_s > 0 and m.peak_memory_bytes > 1e7
    assert m.mean_layers_used == 1.0  # one layer is not routed
    assert (
        llm.generate(PROMPT, max_new_tokens=6, force_routing="all").metrics.mean_layers_used == 4.0
    )
    assert m.to_dict()["decode_tps"] == m.decode_tps


@pytest.mark.parametrize("bad", [-1, VOCAB, 10**9])
def test_token_id_out_of_range(llm, bad):
    with pytest.raises(
        ValueOutOfRangeError, match=rf"token id {bad} at position 1; the vocabulary is 0\.\.257"
    ):
        llm.generate([1, bad])


def test_empty_and_long_prompts(llm):
    for empty in ("", []):
        with pytest.raises(ValueOutOfRangeError, match="the prompt is empty"):
            llm.generate(empty)
    with pytest.raises(
        ValueOutOfRangeError, match=r"1000 prompt tokens \+ 26 new ones do not fit 1024"
    ):
        llm.generate([1] * 1000, max_new_tokens=26)
    assert len(llm.generate([1] * 1000, max_new_tokens=25, eos_token_id=-1).token_ids) == 25


def test_unknown_arguments_get_a_suggestion(llm):
    with pytest.raises(
        TypeError, match="unknown argument 'max_tokens'; did you mean 'max_new_tokens'"
    ):
        llm.generate(PROMPT, max_tokens=3)
    with pytest.raises(TypeError, match="did you mean 'force_routing'"):
        llm.generate(PROMPT, forced_routing="all")


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -1.0},
        {"top_k": -2},
        {"repetition_penalty": 0.0},
        {"num_return_sequences": 0},
        {"stop_strings": [""]},
        {"logprobs": -1},
    ],
)
def test_bad_values(llm, bad):
    (name,) = bad
    with pytest.raises(ValueOutOfRangeError, match=f"{name} is "):
        llm.generate(PROMPT, **bad)


@pytest.mark.parametrize(
    ("tau", "message"), [(1.5, "value 0 is 1.5"), ([0.5, 0.5], "2 values"), (float("nan"), "nan")]
)
def test_bad_thresholds(llm, tau, message):
    with pytest.raises(ValueOutOfRangeError, match=message):
        llm.generate(PROMPT, skip_threshold=tau)


def test_thresholds_dial_the_layers_used(llm):
    used = [
        llm.generate(PROMPT, max_new_tokens=8, skip_threshold=t).metrics.mean_layers_used
        for t in (0.0, 0.5, 1.0)
    ]
    assert used[0] == 4.0 and used[2] == 1.0 and used[0] > used[1] > used[2]


@pytest.mark.parametrize(
    ("force", "error", "message"),
    [
        ("some", ValueOutOfRangeError, "'some'; wanted 'all', 'none'"),
        (
            [0, 2],
            ValueOutOfRangeError,
            r"layers \[0\] are not routed; this model routes \[1, 2, 3\]",
        ),
        (1.2, ValueOutOfRangeError, "skip ratio is 1.2"),
        (torch.ones(5, 2), ShapeError, r"mask is \[5, 2\]; wanted \[tokens, 3\]"),
        (torch.ones(9, 3).bool(), ShapeError, "covers 9 tokens, position 9 is needed"),
    ],
)
def test_bad_routing(llm, force, error, message):
    with pytest.raises(error, match=message):
        llm.generate(PROMPT, max_new_tokens=5, eos_token_id=-1, force_routing=force)
    assert llm.generate(PROMPT, max_new_tokens=2).token_ids  # still usable


def test_text_without_tokenizer_and_chat_without_template(llm):
    bare = FlexiDepth(llm.engine, llm.config, None, routers_trained=True, source="test")
    with pytest.raises(UnsupportedError, match="came without a tokenizer"):
        bare.generate("hello")
    assert bare.generate([1, 2], max_new_tokens=2).text == ""
    plain = FlexiDepth(
        llm.engine, llm.config, byte_tokenizer(None), routers_trained=True, source="test"
    )
    with pytest.raises(UnsupportedError, match="no chat template"):
        plain.generate([{"role": "user", "content": "hi"}])


def test_close(llm):
    llm.close()
    llm.close()
    for call in (
        lambda: llm.generate(PROMPT),
        lambda: next(llm.stream(PROMPT)),
        llm.new_cache,
        lambda: llm.score(PROMPT),
    ):
        with pytest.raises(EngineClosedError, match="close"):
            call()
