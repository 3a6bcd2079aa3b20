"""FlexiDepth on the CUDA engine says what it says on the CPU engine."""

from __future__ import annotations

import pytest
import torch

from flexidepth import FlexiDepth
from flexidepth.errors import OutOfMemoryError, ShapeError
from flexidepth_ext.engine import Engine

from ..api.conftest import EOS, VOCAB
from ..api.tokenizers import byte_tokenizer
from ..engine.conftest import tiny_config, tiny_model, weights_of


@pytest.fixture
def pair(make):
    """The same model on both engines, in float32."""
    model = tiny_model(tiny_config(vocab_size=VOCAB, eos_token_id=EOS, bos_token_id=EOS - 1))
    engines = [make(model), Engine(model.config, weights_of(model), dtype=torch.float32)]
    both = [
        FlexiDepth(engine, model.config, byte_tokenizer(), routers_trained=True, source="test")
        for engine in engines
    ]
    yield both
    for llm in both:
        llm.close()


def same(pair, prompt, **arguments):
    """Both answers, which are one."""
    outputs = [llm.generate(prompt, return_routing=True, **arguments) for llm in pair]
    if not isinstance(outputs[0], list):
        outputs = [[output] for output in outputs]
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason
        assert torch.equal(ours.routing.ran, theirs.routing.ran)
        assert torch.allclose(
            ours.routing.gates.nan_to_num(7), theirs.routing.gates.nan_to_num(7), atol=1e-5
        )
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    return outputs[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        {"force_routing": 0.5, "routing_seed": 1},
        {"force_routing": "none"},
        {"skip_threshold": 0.7},
    ],
    ids=str,
)
def test_an_answer(pair, arguments):
    (answer,) = same(pair, "Once upon", max_new_tokens=7, **arguments)
    assert len(answer.token_ids) == 7 and answer.finish_reason == "length"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"skip_threshold": 0.7},
        {"force_routing": 0.5, "routing_seed": 1},
        {"temperature": 0.8, "top_k": 5},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_where_torch_makes_tensors_by_default_changes_nothing(pair, arguments):
    """Notebooks set "cuda" once for all; here it is a device that holds no values."""

    def tokens():
        outputs = [llm.generate("Once upon", max_new_tokens=5, seed=3, **arguments) for llm in pair]
        return [output.token_ids for output in outputs]

    want = tokens()
    with torch.device("meta"):
        assert tokens() == want
        scores = [llm.score("Once upon a time") for llm in pair]
    assert scores[0].logprobs.device.type == "cpu"


def test_one_token_needs_no_step(pair):
    (answer,) = same(pair, "Once", max_new_tokens=1)
    assert len(answer.token_ids) == 1


def test_what_the_host_decides_goes_step_by_step(pair):
    def no_spaces(ids, scores):
        scores[:, 32] = -torch.inf
        return scores

    same(pair, "Once", max_new_tokens=4, repetition_penalty=1.3)
    same(pair, "Once", max_new_tokens=4, logits_processor=[no_spaces])
    answer = same(pair, "Once", max_new_tokens=4, logprobs=2)[0]
    assert len(answer.top_logprobs) == 4


def test_sequences_that_end_at_different_times(pair):
    """An end token takes one out of the batch while a step of all is in flight."""
    prompts = ["One", "Two and more", "3"]
    free = same(pair, prompts, max_new_tokens=9)
    ends = free[1].token_ids[3]  # the second prompt's fourth token ends an answer now
    ended = same(pair, prompts, max_new_tokens=9, eos_token_id=ends)
    assert {answer.finish_reason for answer in ended} >= {"eos"}
    assert ended[1].token_ids == free[1].token_ids[: free[1].token_ids.index(ends) + 1]
    same(pair, ["One"], max_new_tokens=6, num_return_sequences=2, temperature=1.0, seed=2)


def test_a_recorded_run_that_ended_early_is_replayed(pair):
    """The mask has no row for a step behind the last one, and nobody needs one."""
    (free,) = same(pair, "Once", max_new_tokens=9)
    (answer,) = same(pair, "Once", max_new_tokens=20, eos_token_id=free.token_ids[4])
    assert answer.finish_reason == "eos"
    (again,) = same(
        pair,
        "Once",
        max_new_tokens=20,
        eos_token_id=free.token_ids[4],
        force_routing=answer.routing,
    )
    assert again.token_ids == answer.token_ids
    for llm in pair:
        with pytest.raises(ShapeError, match="the mask covers"):
            llm.generate("Once", max_new_tokens=20, force_routing=answer.routing)


def test_an_answer_that_no_memory_is_left_for(pair, monkeypatch):
    """What was computed is yielded before the error comes."""
    llm = pair[0]
    whole = llm.generate("Once", max_new_tokens=6).token_ids
    seen = []
    from flexidepth_ext import cuda_cache

    reserve = cuda_cache.CudaKVCache.reserve

    def refuse(cache, tokens):
        if tokens > 4 + 2:
            raise OutOfMemoryError("cache: no memory")
        reserve(cache, tokens)

    monkeypatch.setattr(cuda_cache.CudaKVCache, "reserve", refuse)
    with pytest.raises(OutOfMemoryError):
        llm.generate("Once", max_new_tokens=6, on_token=lambda event: seen.append(event.token_id))
    assert seen == whole[: len(seen)] and len(seen) == 3
    monkeypatch.undo()
    assert llm.generate("Once", max_new_tokens=6).token_ids == whole


def test_a_stream_that_is_left_keeps_a_cache_that_fits_its_tokens(pair):
    caches = [llm.new_cache() for llm in pair]
    for llm, cache in zip(pair, caches, strict=True):
        stream = llm.stream("Once upon a", max_new_tokens=20, cache=cache)
        read = [next(stream).token_id for _ in range(4)]
        stream.close()
        assert len(read) == 4
    assert caches[0].token_ids == caches[1].token_ids
    assert caches[0].length == caches[1].length == len(caches[0].token_ids)
    more = [
        llm.generate([*cache.token_ids, 65], max_new_tokens=4, cache=cache, return_routing=True)
        for llm, cache in zip(pair, caches, strict=True)
    ]
    assert more[0].token_ids == more[1].token_ids
    assert more[0].metrics.cached_tokens == more[1].metrics.cached_tokens > 0
    assert caches[0].length == caches[1].length


def test_scores(pair):
    ours, theirs = (llm.score("Once upon a time") for llm in pair)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-4)
    assert ours.mean_layers_used == theirs.mean_layers_used


def test_a_failure_between_two_tokens_leaves_the_model_usable(pair, monkeypatch):
    llm = pair[0]

    def interrupted(event):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(event.token_id)

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        llm.generate("Once", max_new_tokens=9, on_token=interrupted)
    whole = llm.generate("Once", max_new_tokens=9)
    assert whole.token_ids[:3] == seen
