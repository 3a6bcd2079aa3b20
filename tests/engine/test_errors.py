"""Bad input gets an error with the values, and the engine goes on."""

from __future__ import annotations

import threading

import pytest
import torch

from flexidepth.errors import (
    DtypeError,
    EngineBusyError,
    EngineClosedError,
    OutOfMemoryError,
    ShapeError,
    UnsupportedError,
    ValueOutOfRangeError,
)
from flexidepth_ext import _C, ops
from flexidepth_ext.engine import Engine

from .conftest import tiny_config, tiny_model, weights_of


@pytest.fixture
def engine(make_engine):
    return make_engine(tiny_model(tiny_config()), max_rows=64)


def tokens(*values):
    return torch.tensor(values, dtype=torch.int32)


def works(engine):
    return torch.isfinite(engine.forward(tokens(1, 2), [2], [engine.new_cache(8)]).logits).all()


@pytest.mark.parametrize("bad", [-1, 211, 2**31 - 1])
def test_token_id_out_of_range(engine, bad):
    cache = engine.new_cache(10)
    with pytest.raises(
        ValueOutOfRangeError, match=rf"token id {bad} at row 1; the vocabulary is 0\.\.210"
    ):
        engine.forward(tokens(3, bad), [2], [cache])
    assert cache.length == 0 and works(engine)


def test_prompt_longer_than_the_cache(engine):
    cache = engine.new_cache(5)
    with pytest.raises(
        ValueOutOfRangeError, match="6 tokens do not fit, the cache holds 0 of at most 5"
    ):
        engine.forward(tokens(*range(6)), [6], [cache])
    assert cache.length == 0 and works(engine)


def test_cache_longer_than_the_positions(engine):
    with pytest.raises(ValueOutOfRangeError, match="max_length is 1025"):
        engine.new_cache(1025)


def test_empty_and_too_many_rows(engine):
    with pytest.raises(ValueOutOfRangeError, match="0 rows"):
        engine.forward(tokens(), [], [])
    with pytest.raises(ValueOutOfRangeError, match="65 rows in one pass; 1 to 64"):
        engine.forward(torch.zeros(65, dtype=torch.int32), [65], [engine.new_cache(100)])
    with pytest.raises(ValueOutOfRangeError, match="sequence 0 brings 0 tokens"):
        engine.forward(tokens(1), [0, 1], [engine.new_cache(4), engine.new_cache(4)])


def test_counts_and_caches_must_agree(engine):
    cache = engine.new_cache(8)
    with pytest.raises(ShapeError, match="counts add up to 3"):
        engine.forward(tokens(1, 2), [3], [cache])
    with pytest.raises(ShapeError, match="1 counts for 2 caches"):
        engine.forward(tokens(1, 2), [2], [cache, engine.new_cache(8)])
    with pytest.raises(ValueOutOfRangeError, match="listed twice"):
        engine.forward(tokens(1, 2), [1, 1], [cache, cache])


def test_cache_of_another_model(engine, make_engine):
    other = make_engine(tiny_model(tiny_config(head_dim=8)))
    with pytest.raises(ShapeError, match="another shape"):
        engine.forward(tokens(1), [1], [other.new_cache(4)])


def test_mask_and_thresholds(engine):
    cache = engine.new_cache(8)
    with pytest.raises(ShapeError, match=r"mask is \[2, 2\]; wanted \[2, 3\]"):
        engine.forward(
            tokens(1, 2), [2], [cache], routing="forced", mask=torch.ones(2, 2, dtype=torch.uint8)
        )
    with pytest.raises(ValueOutOfRangeError, match="needs a mask"):
        engine.forward(tokens(1, 2), [2], [cache], routing="forced_hard")
    with pytest.raises(ShapeError, match="2 thresholds; this model routes 3"):
        engine.forward(tokens(1), [1], [cache], thresholds=torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueOutOfRangeError, match="routing 'fast'"):
        engine.forward(tokens(1), [1], [cache], routing="fast")
    with pytest.raises(ValueOutOfRangeError, match="logits row 2 asked of 2 rows"):
        engine.forward(tokens(1, 2), [2], [cache], logits_rows=tokens(2))
    assert cache.length == 0 and works(engine)


def test_tensor_types(engine):
    with pytest.raises(DtypeError, match=r"token_ids has dtype torch\.int64; wanted torch\.int32"):
        engine.forward(torch.tensor([1]), [1], [engine.new_cache(4)])
    with pytest.raises(ShapeError, match="contiguous"):
        engine.forward(torch.zeros(8, dtype=torch.int32)[::2], [4], [engine.new_cache(4)])


def load(model, dtype=torch.float32, change=lambda w: w, **arguments):
    return Engine(model.config, change(weights_of(model)), dtype=dtype, **arguments)


def test_nan_in_a_weight():
    def spoil(weights):
        return [
            (
                n,
                t.clone().index_fill_(0, torch.tensor([2]), float("nan"))
                if "layers.2.mlp.up" in n
                else t,
            )
            for n, t in weights
        ]

    with pytest.raises(
        ValueOutOfRangeError, match=r"48 of 5376 values of model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        load(tiny_model(tiny_config()), change=spoil)


def test_missing_unexpected_and_misshapen_weights():
    model = tiny_model(tiny_config())
    with pytest.raises(ValueOutOfRangeError, match=r"1 tensors missing: model\.norm\.weight"):
        load(model, change=lambda w: [x for x in w if x[0] != "model.norm.weight"])
    with pytest.raises(ValueOutOfRangeError, match=r"unexpected tensor model\.extra"):
        load(model, change=lambda w: [*w, ("model.extra", torch.zeros(3))])
    with pytest.raises(ShapeError, match=r"model\.norm\.weight is \[7, 1\]; wanted \[48, 1\]"):
        load(model, change=lambda w: [(n, t[:7] if n == "model.norm.weight" else t) for n, t in w])


def test_types_and_threads_of_a_load():
    model = tiny_model(tiny_config())
    with pytest.raises(DtypeError, match=r"torch\.float16"):
        load(model, torch.float16)
    with pytest.raises(ValueOutOfRangeError, match="num_threads is 0"):
        load(model, num_threads=0)
    with pytest.raises(DtypeError, match=r"torch\.int8"):
        load(model, change=lambda w: [(n, t.to(torch.int8)) for n, t in w])
    with pytest.raises(
        UnsupportedError, match="'sse9' was asked; this build and processor have generic"
    ):
        load(model, isa="sse9")


def test_environment_chooses_the_instruction_set(monkeypatch):
    model = tiny_model(tiny_config())
    monkeypatch.setenv("FLEXIDEPTH_ISA", "generic")
    assert load(model).isa == "generic"
    monkeypatch.setenv("FLEXIDEPTH_ISA", "nonsense")
    with pytest.raises(UnsupportedError, match="nonsense"):
        load(model)


def test_out_of_memory_names_the_size():
    cache = _C.KVCache(0, 10**6, 10**5, 256, 10)  # one page: 10^6 layers x 10^5 heads, 50 petabytes
    with pytest.raises(OutOfMemoryError, match=r"the system refused 5[0-9]+ bytes"):
        ops.kv_append(cache, torch.zeros(1, 10**5 * 256), torch.zeros(1, 10**5 * 256))
    assert cache.length == 0


def test_closed(engine):
    used = engine.weight_bytes
    engine.close()
    engine.close()
    assert engine.closed and used > 0 and engine.weight_bytes == 0
    with pytest.raises(EngineClosedError, match="after close"):
        engine.new_cache(4)
    with pytest.raises(EngineClosedError, match="after close"):
        engine.sample(
            torch.zeros(1, 211), temperature=0, top_k=0, top_p=1, min_p=0,
            seeds=torch.zeros(1, dtype=torch.int64), positions=torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip


def test_two_threads_on_one_engine(make_engine):
    """Whoever comes second gets an error, nobody hangs, and the first one's answer is right."""
    engine = make_engine(
        tiny_model(tiny_config(hidden_size=192, intermediate_size=768)), num_threads=1, max_rows=512
    )
    ids = torch.zeros(512, dtype=torch.int32)
    want = engine.forward(ids, [512], [engine.new_cache(512)]).logits.clone()
    outcomes = []

    def work():
        for _ in range(10):
            try:
                engine.forward(ids, [512], [engine.new_cache(512)])
                outcomes.append("done")
            except EngineBusyError as error:
                assert "one engine serves one thread" in str(error)
                outcomes.append("busy")

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(t.is_alive() for t in threads)
    assert "busy" in outcomes and "done" in outcomes
    assert torch.equal(engine.forward(ids, [512], [engine.new_cache(512)]).logits, want)
