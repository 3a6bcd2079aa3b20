"""Which form a decoding pass takes: forced, or measured without a trace in what is decoded."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext import cuda_choice
from flexidepth_ext.cuda_choice import MOST_LAYER_BYTES, may_pay
from flexidepth_ext.cuda_decode import DecodeState, Sampling
from flexidepth_ext.errors import UnsupportedError, ValueOutOfRangeError

from ..engine.conftest import tiny_config, tiny_model
from .conftest import ON_DEVICE
from .runtime import FakeRuntime
from .test_decode import ahead, assert_same, plain

DRAW = Sampling(0.9, 40)
needs_script = pytest.mark.skipif(ON_DEVICE, reason="scripts what the fake runtime measures")


@pytest.fixture
def forms(monkeypatch):
    """Of each pass that was queued for decoding, whether it was persistent. A graph queues it twice."""
    seen: list[bool] = []
    queue = DecodeState._launch_pass

    def noted(state, pages, routing, persistent):
        seen.append(persistent)
        queue(state, pages, routing, persistent)

    monkeypatch.setattr(DecodeState, "_launch_pass", noted)
    return seen


@pytest.fixture
def scripted(make, request):
    """An engine that is free to choose, and finds these seconds."""

    def engine(*times: float, **arguments):
        runtime = FakeRuntime(request.getfixturevalue("emulated"), times=times)
        return make(tiny_model(tiny_config()), persistent=None, runtime=runtime, **arguments)

    return engine


@needs_script
@pytest.mark.parametrize(
    ("times", "persistent"), [((2e-3, 1e-3), True), ((1e-3, 2e-3), False), ((1e-3, 1e-3), False)]
)
def test_the_faster_form_is_taken(scripted, make, ids, forms, times, persistent):
    """And tokens, draws and caches are as if nothing had been measured."""
    engine, other = scripted(*times), make(tiny_model(tiny_config()))
    starts, tokens = [ids[:5], ids[5:17]], [1, 2]
    got = ahead(engine, starts, tokens, 4, DRAW)
    assert_same(got, plain(other, starts, tokens, 4, DRAW))
    # Two that are timed, and the step.
    assert forms == [form for form in (False, True, persistent) for _ in range(2)]
    (choice,) = engine.pass_choices
    assert (choice.sequences, choice.pages, choice.routing) == (2, 1, "router")
    assert (choice.kernels, choice.persistent) == times
    assert choice.to_dict()["chose_persistent"] is choice.chose_persistent is persistent
    assert [graph.replays for graph in engine.runtime.graphs] == [2, 2, 4]


@needs_script
def test_it_is_measured_once_for_a_context_and_a_way_to_route(scripted, ids, forms):
    engine = scripted(2.0, 1.0, 1.0, 2.0, 2.0, 1.0)  # more would raise StopIteration
    for sampling in (Sampling(), DRAW):
        ahead(engine, [ids[:3]], [1], 2, sampling)
    assert forms[::2] == forms[1::2] == [False, True, True]  # one graph for both ways to draw
    del forms[:]
    ahead(engine, [ids[:3]], [1], 2, Sampling(), routing="dense")
    ahead(engine, [256], [1], 2, Sampling())
    assert forms[::2] == forms[1::2] == [False, True, False, False, True, True]
    assert [(c.pages, c.routing, c.chose_persistent) for c in engine.pass_choices] == [
        (1, "router", True), (1, "dense", False), (2, "router", True)
    ]  # fmt: skip


def test_measured_for_real(make, ids):
    """On a device the times are a device's; either form decodes what single passes give."""
    engine, other = (
        make(tiny_model(tiny_config()), persistent=None),
        make(tiny_model(tiny_config())),
    )
    got = ahead(engine, [ids[:5]], [1], 4, Sampling())
    assert_same(got, plain(other, [ids[:5]], [1], 4, Sampling()))
    (choice,) = engine.pass_choices
    assert choice.kernels > 0 and choice.persistent is not None and choice.persistent > 0


@pytest.mark.parametrize("form", [False, True])
@pytest.mark.parametrize("check", [False, True])
def test_a_form_that_is_asked_for(make, ids, forms, form, check):
    model = tiny_model(tiny_config())
    engine, other = make(model, persistent=form, check=check), make(model)
    got = ahead(engine, [ids[:5]], [1], 3, DRAW)
    assert set(forms) == {form} and engine.pass_choices == []
    assert_same(got, plain(other, [ids[:5]], [1], 3, DRAW))


@pytest.mark.parametrize(("text", "form"), [("0", False), ("1", True), ("", None)])
def test_the_environment_asks(make, monkeypatch, text, form):
    monkeypatch.setenv("FLEXIDEPTH_CUDA_PERSISTENT", text)
    assert make(tiny_model(tiny_config()), persistent=None).persistent is form
    assert make(tiny_model(tiny_config()), persistent=True).persistent


def test_what_cannot_be_asked(make, monkeypatch):
    monkeypatch.setenv("FLEXIDEPTH_CUDA_PERSISTENT", "yes")
    with pytest.raises(ValueOutOfRangeError, match=r"PERSISTENT is 'yes'; wanted 0 or 1"):
        make(tiny_model(tiny_config()), persistent=None)
    monkeypatch.setenv("FLEXIDEPTH_CUDA_PERSISTENT", "1")
    with pytest.raises(UnsupportedError, match="takes a folded router"):
        make(tiny_model(tiny_config()), persistent=None, strict_router=True)
    monkeypatch.delenv("FLEXIDEPTH_CUDA_PERSISTENT")
    assert make(tiny_model(tiny_config()), persistent=None, strict_router=True).persistent is False


def test_large_models_are_not_measured(make, ids, forms, monkeypatch):
    monkeypatch.setattr(cuda_choice, "MOST_LAYER_BYTES", 1000)
    engine = make(tiny_model(tiny_config()), persistent=None)
    ahead(engine, [ids[:3]], [1], 2, Sampling())
    assert set(forms) == {False} and engine.pass_choices == []


def test_a_layers_bytes_are_what_counts():
    half = MOST_LAYER_BYTES // 2
    fits = {"model.layers.3.a": half, "model.layers.3.b": half, "lm_head.weight": 10**10}
    assert may_pay({**fits, "model.layers.13.a": half})
    assert not may_pay({**fits, "model.layers.3.c": 1})


@needs_script
def test_a_device_that_refuses(scripted, ids, monkeypatch):
    queue = DecodeState._launch_pass

    def refused(state, pages, routing, persistent):
        if persistent:
            raise UnsupportedError("persistent_pass: no room")
        queue(state, pages, routing, persistent)

    monkeypatch.setattr(DecodeState, "_launch_pass", refused)
    engine = scripted(1.0)
    assert len(ahead(engine, [ids[:3]], [1], 2, Sampling())) == 2
    (choice,) = engine.pass_choices
    assert not choice.chose_persistent
    assert (choice.persistent, choice.said) == (None, "persistent_pass: no room")


def test_a_closed_engine_keeps_no_table(make):
    engine = make(tiny_model(tiny_config()), persistent=True)
    assert isinstance(engine._layer_table, torch.Tensor)
    engine.close()
    assert engine._layer_table is None
