"""Decoding in graphs, one step ahead of the host: the tokens of plain passes, whatever happens on the way."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext.cuda_choice import PassForm
from flexidepth_ext.cuda_decode import RING, DecodeState, Sampling
from flexidepth_ext.errors import OutOfMemoryError, ShapeError, ValueOutOfRangeError

from ..engine.conftest import tiny_config, tiny_model
from .conftest import ON_DEVICE

SEEDS = [3, 4, 5]


def prefilled(engine, starts, room=400):
    """A cache of each text; of a number, with as many tokens that nobody computed."""
    caches = [engine.new_cache(room) for _ in starts]
    for cache, start in zip(caches, starts, strict=True):
        if isinstance(start, int):
            cache.extend_with_zeros(start)
        else:
            engine.forward(start.contiguous(), [len(start)], [cache])
    return caches


def plain(engine, starts, tokens, steps, sampling, masks=None, **routing):
    """Tokens, log-probabilities, gates and decisions of single passes [steps, sequences, ...]."""
    caches, made = prefilled(engine, starts), []
    for number in range(steps):
        own = {} if masks is None else {"mask": masks[number]}
        draws = torch.tensor([cache.length + 1 for cache in caches])
        step = engine.forward(
            torch.tensor(tokens, dtype=torch.int32), [1] * len(caches), caches, **routing, **own
        )
        chosen, logprobs = engine.sample(
            step.logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seeds=torch.tensor(SEEDS[: len(caches)]),
            positions=draws,
        )
        tokens = chosen.tolist()
        made.append((tokens, logprobs.tolist(), step.gates, step.ran))
    return made


def ahead(engine, starts, tokens, steps, sampling, masks=None, **routing):
    """The same in graphs, always one step in flight."""
    caches, made = prefilled(engine, starts), []
    run = engine.decode(caches, tokens, sampling, seeds=SEEDS[: len(caches)], **routing)
    for number in range(steps + 1):
        if number < steps:
            run.launch(None if masks is None else masks[number])
        if number > 0:
            step = run.collect()
            made.append((step.tokens, step.logprobs, step.gates, step.ran))
    assert run.in_flight == 0
    assert [c.length for c in caches] == [
        (start if isinstance(start, int) else len(start)) + steps for start in starts
    ]
    return made


def assert_same(one, other):
    for (tokens, logprobs, gates, ran), (*theirs, their_gates, their_ran) in zip(
        one, other, strict=True
    ):
        assert tokens == theirs[0] and logprobs == theirs[1]
        assert torch.equal(ran, their_ran)
        assert torch.equal(gates.nan_to_num(7), their_gates.nan_to_num(7))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, 40, 0.95, 0.01)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_same_tokens_as_single_passes(make, ids, sampling, count):
    engine = make(tiny_model(tiny_config()))
    starts, tokens, steps = [ids[:5], ids[5:17], ids[:9]][:count], [1, 2, 3][:count], RING + 3
    got = ahead(engine, starts, tokens, steps, sampling)
    assert_same(got, plain(engine, starts, tokens, steps, sampling))
    assert 0 < sum(float(ran.float().mean()) for *_, ran in got) < steps  # both paths were taken
    if not ON_DEVICE:
        assert [graph.replays for graph in engine.runtime.graphs] == [steps]


@pytest.mark.parametrize("mode", ["dense", "forced", "forced_hard", "thresholds"])
def test_every_way_to_route(make, ids, mode):
    engine = make(tiny_model(tiny_config()))
    starts, tokens, steps = [ids[:5], ids[5:9]], [1, 2], RING + 2
    routing = {"thresholds": torch.full((3,), 0.9)} if mode == "thresholds" else {"routing": mode}
    masks = None
    if mode.startswith("forced"):
        masks = list(torch.randint(0, 2, (steps, 2, 3), dtype=torch.uint8))
    got = ahead(engine, starts, tokens, steps, Sampling(), masks, **routing)
    assert_same(got, plain(engine, starts, tokens, steps, Sampling(), masks, **routing))
    if masks is not None:
        assert [step[3].tolist() for step in got] == [mask.tolist() for mask in masks]


def test_a_mask_that_stays_is_copied_once(make, ids, monkeypatch):
    """A copy before a graph takes its time on the device. Others come when they are due, also in the next run."""
    engine = make(tiny_model(tiny_config()))
    taken = []
    take = DecodeState.take_mask
    copy = torch.Tensor.copy_

    def counted(state, mask, slot):
        def noted(to, *arguments, **options):
            taken.append(to is state.mask)
            return copy(to, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", noted)
            take(state, mask, slot)

    monkeypatch.setattr(DecodeState, "take_mask", counted)
    one, other = (torch.tensor([row], dtype=torch.uint8) for row in ([1, 0, 1], [0, 1, 1]))
    for masks in ([one] * 6 + [other] * 2 + [one] * 5, [one] * 3 + [other.clone()] * 5):
        got = ahead(engine, [ids[:4]], [1], len(masks), Sampling(), masks=masks, routing="forced")
        assert [step[3].tolist() for step in got] == [mask.tolist() for mask in masks]
    assert sum(taken) == 3 + 1


def test_a_context_that_grows_over_a_page(make):
    """A page is added, and a graph for the longer context is captured, between two steps."""
    engine = make(tiny_model(tiny_config()))
    steps = 6
    got = ahead(engine, [253], [1], steps, Sampling())
    assert_same(got, plain(engine, [253], [1], steps, Sampling()))
    if not ON_DEVICE:
        assert [graph.replays for graph in engine.runtime.graphs] == [3, 3]


def test_debugging_waits_for_each_kernel_and_captures_nothing(make, ids):
    model = tiny_model(tiny_config())
    engines = make(model), make(model, check=True, overlap=True)
    one, other = (ahead(e, [ids[:5]], [1], 4, Sampling()) for e in engines)
    assert_same(one, other)
    if not ON_DEVICE:
        assert engines[1].runtime.graphs == []
        assert [e.plain_form for e in engines] == [PassForm.KERNELS, PassForm.OVERLAP]


def test_a_graph_is_captured_once(make, ids):
    if ON_DEVICE:
        pytest.skip("counts the graphs of the fake runtime")
    engine = make(tiny_model(tiny_config()))
    for tau in (0.2, 0.8):
        ahead(engine, [ids[:3]], [1], 2, Sampling(), thresholds=torch.full((3,), tau))
    assert len(engine.runtime.graphs) == 1
    ahead(engine, [ids[:3], ids[:4]], [1, 2], 2, Sampling(0.5))
    assert len(engine.runtime.graphs) == 2


def test_one_graph_draws_in_every_way(make, ids):
    """The tokens of single passes, each with its own settings; what a graph captured does not stay with it."""
    engine = make(tiny_model(tiny_config()))
    starts, tokens, steps = [ids[:5], ids[:9]], [1, 2], RING + 1
    ways = [
        Sampling(),
        Sampling(0.7),
        Sampling(3.0),
        Sampling(3.0, top_k=2),
        Sampling(3.0, top_p=0.3),
        Sampling(3.0, min_p=0.9),
        Sampling(0.9, 10**12, 0.95, 0.01),
        Sampling(),
    ]
    made = []
    for sampling in ways:
        made.append(ahead(engine, starts, tokens, steps, sampling))
        assert_same(made[-1], plain(engine, starts, tokens, steps, sampling))
    drawn = [tuple(tuple(step[0]) for step in one) for one in made]
    assert drawn[0] == drawn[-1] and len(set(drawn)) >= 5
    if not ON_DEVICE:
        assert [graph.replays for graph in engine.runtime.graphs] == [steps * len(ways)]


def test_what_is_cancelled_leaves_the_caches_as_they_were_read(make, ids):
    engine = make(tiny_model(tiny_config()))
    caches = prefilled(engine, [ids[:5], ids[:7]])
    run = engine.decode(caches, [1, 2], Sampling(), seeds=[0, 0])
    run.launch()
    run.launch()
    run.collect()
    run.forget(1)
    assert [c.length for c in caches] == [7, 8]
    with pytest.raises(ValueOutOfRangeError, match="a sequence of this run is over"):
        run.launch()
    run.cancel()
    run.cancel()
    assert [c.length for c in caches] == [6, 8] and run.in_flight == 0
    with pytest.raises(ValueOutOfRangeError, match="no step is in flight"):
        run.collect()


def test_no_memory_for_another_page(make, monkeypatch):
    """The engine stays usable, and what is in flight can be read."""
    engine = make(tiny_model(tiny_config()))
    (cache,) = prefilled(engine, [255])
    run = engine.decode([cache], [1], Sampling(), seeds=[0])
    run.launch()

    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no")

    with monkeypatch.context() as patch:
        patch.setattr("flexidepth_ext.cuda_cache.torch.empty", refuse)
        with pytest.raises(OutOfMemoryError, match=r"1 more pages of 0\.\d MB.*257 tokens.*lower"):
            run.launch()
    first = run.collect().tokens
    assert cache.length == 256
    run.launch()
    assert len(run.collect().tokens) == len(first) == 1


@pytest.mark.parametrize("start", [5, 253])
def test_a_refused_graph_leaves_everything_as_it_was(make, monkeypatch, start):
    """The first one, and that of a longer context with a step in flight; both behind the run that loads kernels."""
    engine, sampling, steps = make(tiny_model(tiny_config())), Sampling(3.0), 6
    expected = plain(engine, [start], [1], steps, sampling)
    (cache,) = prefilled(engine, [start])
    run = engine.decode([cache], [1], sampling, seeds=SEEDS[:1])
    state = run._state
    moved = "tokens", "positions", "draws", "step", "seeds", "sampling", "thresholds", "tables"

    def refuse(launch):
        launch()
        raise torch.OutOfMemoryError("no")

    refused = []

    def launch():
        engine.runtime.synchronize()
        before = [getattr(state, name).clone() for name in moved]
        in_flight, length = run.in_flight, cache.length
        with monkeypatch.context() as patch:
            patch.setattr(engine.runtime, "capture", refuse)
            try:
                return run.launch()
            except OutOfMemoryError:
                refused.append(length)
        engine.runtime.synchronize()
        assert (run.in_flight, cache.length) == (in_flight, length)
        for name, value in zip(moved, before, strict=True):
            assert torch.equal(getattr(state, name), value), name
        return run.launch()

    made = []
    for number in range(steps + 1):
        if number < steps:
            launch()
        if number > 0:
            step = run.collect()
            made.append((step.tokens, step.logprobs, step.gates, step.ran))
    assert refused == ([253, 256] if start == 253 else [5])
    assert_same(made, expected)


def test_what_it_refuses(make, ids):
    engine = make(tiny_model(tiny_config()))
    (cache,) = prefilled(engine, [ids[:5]], room=6)

    def decode(caches=(cache,), tokens=(1,), sampling=None, seeds=(0,), **more):
        chosen = sampling or Sampling()
        return engine.decode(list(caches), list(tokens), chosen, seeds=list(seeds), **more)

    for match, error, call in (
        ("token id 999", ValueOutOfRangeError, {"tokens": (999,)}),
        ("temperature is -1", ValueOutOfRangeError, {"sampling": Sampling(-1.0)}),
        ("2 seeds for 1 sequences", ShapeError, {"seeds": (0, 1)}),
        ("at most 8 can", ValueOutOfRangeError, {
            "caches": [engine.new_cache(9) for _ in range(9)], "tokens": [1] * 9, "seeds": [0] * 9
        }),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            decode(**call)
    run = decode(routing="forced")
    with pytest.raises(ShapeError, match=r"needs a mask \[1, 3\] of every step"):
        run.launch()
    run = decode()
    run.launch()
    with pytest.raises(ValueOutOfRangeError, match="7 tokens do not fit max_length 6"):
        run.launch()
    run.collect()
    (long,) = prefilled(engine, [ids[:5]])
    run = decode(caches=(long,))
    for _ in range(RING - 1):
        run.launch()
    with pytest.raises(ValueOutOfRangeError, match="3 steps are in flight"):
        run.launch()


def test_logits_that_nothing_can_be_drawn_from(make, ids):
    model = tiny_model(tiny_config(tie_word_embeddings=False))
    engine = make(model)
    (cache,) = prefilled(engine, [ids[:5]])
    with engine.runtime.active():
        engine.weights["lm_head.weight"].fill_(torch.nan)
    run = engine.decode([cache], [1], Sampling(), seeds=[0])
    run.launch()
    with pytest.raises(ValueOutOfRangeError, match="row 0 of the logits has a NaN"):
        run.collect()
