"""Batch, chunk, threads and stale memory never change a bit."""

from __future__ import annotations

import pytest
import torch

from .conftest import tiny_config, tiny_model

DTYPES = [torch.float32, torch.bfloat16]


def rows(n):
    return torch.arange(n, dtype=torch.int32)


def whole(engine, ids):
    step = engine.forward(ids, [len(ids)], [engine.new_cache(len(ids))], logits_rows=rows(len(ids)))
    return step.logits.clone(), step.gates.clone(), step.ran.clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 3, 64, 299])
def test_a_prompt_in_chunks_is_the_prompt_at_once(make_engine, ids, dtype, chunk):
    engine = make_engine(tiny_model(tiny_config()), dtype)
    logits, gates, ran = whole(engine, ids)
    assert 0 < ran.float().mean() < 1
    cache = engine.new_cache(300)
    for start in range(0, 300, chunk):
        piece = ids[start : start + chunk]
        step = engine.forward(piece, [len(piece)], [cache], logits_rows=rows(len(piece)))
        assert torch.equal(step.logits, logits[start : start + chunk])
        assert torch.equal(step.gates, gates[start : start + chunk])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_alone_and_in_a_batch(make_engine, ids, dtype):
    engine = make_engine(tiny_model(tiny_config()), dtype)
    lengths = [5, 1, 260, 31, 2]
    starts = [0, 7, 20, 50, 90]
    parts = [ids[s : s + n].contiguous() for s, n in zip(starts, lengths, strict=True)]
    alone = [whole(engine, part)[0][-1] for part in parts]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        caches = [engine.new_cache(300) for _ in order]
        step = engine.forward(
            torch.cat([parts[i] for i in order]), [lengths[i] for i in order], caches
        )
        assert torch.equal(step.logits, torch.stack([alone[i] for i in order]))
        # One more token each, decoded together.
        tokens = torch.tensor([11, 12, 13, 14, 15], dtype=torch.int32)
        together = engine.forward(tokens, [1] * 5, caches).logits.clone()
        for place, i in enumerate(order):
            single = whole(engine, torch.cat([parts[i], tokens[place : place + 1]]))[0][-1]
            assert torch.equal(together[place], single)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_thread_count(make_engine, ids, threads):
    model = tiny_model(tiny_config())
    one = whole(make_engine(model, num_threads=1), ids)
    many = whole(make_engine(model, num_threads=threads), ids)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True) if not a.isnan().any())


def test_stale_memory(make_engine, ids):
    engine = make_engine(tiny_model(tiny_config()))
    before = whole(engine, ids)
    engine._native.poison_scratch()
    assert torch.equal(whole(engine, ids)[0], before[0])
    cache = engine.new_cache(300)
    engine.forward(ids[:100], [100], [cache])
    cache._native.poison_unused()
    step = engine.forward(ids[100:], [200], [cache], logits_rows=rows(200))
    assert torch.equal(step.logits, before[0][100:])


def test_truncate_and_copy(make_engine, ids):
    engine = make_engine(tiny_model(tiny_config()))
    logits, _, _ = whole(engine, ids)
    cache, other = engine.new_cache(300), engine.new_cache(300)
    engine.forward(ids, [300], [cache])
    other.copy_from(cache)
    for held in (cache, other):
        held.truncate(257)
        step = engine.forward(ids[257:], [43], [held])
        assert torch.equal(step.logits[0], logits[-1])
    cache.truncate(3)
    assert cache.nbytes < other.nbytes


def test_two_runs_are_identical(make_engine, ids):
    engine = make_engine(tiny_model(tiny_config()), torch.bfloat16)
    assert all(
        torch.equal(a, b) for a, b in zip(whole(engine, ids), whole(engine, ids), strict=True)
    )
