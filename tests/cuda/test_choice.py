"""Which form a decoding pass takes: forced, or measured without a trace in what is decoded."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext import cuda_choice
from flexidepth_ext.cuda_choice import MOST_LAYER_BYTES, PassForm, may_pay, open_forms
from flexidepth_ext.cuda_decode import DecodeState, Sampling
from flexidepth_ext.errors import UnsupportedError, ValueOutOfRangeError

from ..engine.conftest import tiny_config, tiny_model
from .conftest import ON_DEVICE
from .runtime import FakeRuntime
from .test_decode import ahead, assert_same, plain

FORMS = KERNELS, OVERLAP, PERSISTENT = tuple(PassForm)
DRAW = Sampling(0.9, 40)
needs_script = pytest.mark.skipif(ON_DEVICE, reason="scripts what the fake runtime measures")


@pytest.fixture
def launched(monkeypatch):
    """The form of each pass that was queued for decoding. A graph queues it twice."""
    seen: list[PassForm] = []
    queue = DecodeState._launch_pass

    def noted(state, pages, routing, form):
        seen.append(form)
        queue(state, pages, routing, form)

    monkeypatch.setattr(DecodeState, "_launch_pass", noted)
    return seen


@pytest.fixture
def scripted(make, request):
    """An engine that is free to choose, and finds these seconds."""

    def engine(*times: float, **arguments):
        runtime = FakeRuntime(request.getfixturevalue("emulated"), times=times)
        free = {"overlap": None, "persistent": None, **arguments}
        return make(tiny_model(tiny_config()), runtime=runtime, **free)

    return engine


@needs_script
@pytest.mark.parametrize(
    ("times", "fastest"),
    [
        ((3e-3, 2e-3, 1e-3), PERSISTENT),
        ((3e-3, 1e-3, 2e-3), OVERLAP),
        ((1e-3, 2e-3, 3e-3), KERNELS),
        ((1e-3, 1e-3, 1e-3), KERNELS),
        ((2e-3, 1e-3, 1e-3), OVERLAP),
    ],
)
def test_the_fastest_form_is_taken(scripted, make, ids, launched, times, fastest):
    """And tokens, draws and caches are as if nothing had been measured."""
    engine, other = scripted(*times), make(tiny_model(tiny_config()))
    starts, tokens = [ids[:5], ids[5:17]], [1, 2]
    got = ahead(engine, starts, tokens, 4, DRAW)
    assert_same(got, plain(other, starts, tokens, 4, DRAW))
    # Three that are timed, and the step.
    assert launched == [form for form in (*FORMS, fastest) for _ in range(2)]
    (choice,) = engine.pass_choices
    assert (choice.sequences, choice.pages, choice.routing) == (2, 1, "router")
    assert choice.seconds == dict(zip(("kernels", "overlap", "persistent"), times, strict=True))
    assert choice.chosen is fastest and choice.to_dict()["chosen"] == fastest.value
    assert [graph.replays for graph in engine.runtime.graphs] == [2, 2, 2, 4]


@needs_script
def test_it_is_measured_once_for_a_context_and_a_way_to_route(scripted, ids, launched):
    # More measurements would raise StopIteration.
    engine = scripted(2.0, 1.0, 1.0, 2.0, 2.0, 1.0, overlap=False)
    for sampling in (Sampling(), DRAW):
        ahead(engine, [ids[:3]], [1], 2, sampling)
    assert (
        launched[::2] == launched[1::2] == [KERNELS, PERSISTENT, PERSISTENT]
    )  # one graph for both
    del launched[:]
    ahead(engine, [ids[:3]], [1], 2, Sampling(), routing="dense")
    ahead(engine, [256], [1], 2, Sampling())
    assert launched[::2] == launched[1::2] == [
        KERNELS, PERSISTENT, KERNELS, KERNELS, PERSISTENT, PERSISTENT
    ]  # fmt: skip
    assert [(c.pages, c.routing, c.chosen) for c in engine.pass_choices] == [
        (1, "router", PERSISTENT), (1, "dense", KERNELS), (2, "router", PERSISTENT)
    ]  # fmt: skip


def test_measured_for_real(make, ids):
    """On a device the times are a device's; any form decodes what single passes give."""
    free = make(tiny_model(tiny_config()), overlap=None, persistent=None)
    other = make(tiny_model(tiny_config()))
    got = ahead(free, [ids[:5]], [1], 4, Sampling())
    assert_same(got, plain(other, [ids[:5]], [1], 4, Sampling()))
    (choice,) = free.pass_choices
    assert set(choice.seconds) == {form.value for form in free.forms} and not choice.said
    assert all(seconds > 0 for seconds in choice.seconds.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("check", [False, True])
def test_a_form_that_is_asked_for(make, ids, launched, form, check):
    model = tiny_model(tiny_config())
    asked = {"overlap": form is OVERLAP, "persistent": form is PERSISTENT}
    engine, other = make(model, check=check, **asked), make(model)
    if form is OVERLAP and not engine.runtime.can_overlap:
        pytest.skip("this device's kernels wait for those ahead of them")
    got = ahead(engine, [ids[:5]], [1], 3, DRAW)
    assert set(launched) == {form} and engine.pass_choices == []
    assert_same(got, plain(other, [ids[:5]], [1], 3, DRAW))


@pytest.mark.parametrize(
    ("overlap", "persistent", "forms"),
    [
        (None, None, FORMS),
        ("0", "", [KERNELS, PERSISTENT]),
        ("1", "", [OVERLAP, PERSISTENT]),
        ("", "0", [KERNELS, OVERLAP]),
        ("0", "0", [KERNELS]),
        ("1", "0", [OVERLAP]),
        ("", "1", [PERSISTENT]),
        ("1", "1", [PERSISTENT]),
    ],
)
def test_the_environment_asks(monkeypatch, overlap, persistent, forms):
    for name, text in (("OVERLAP", overlap), ("PERSISTENT", persistent)):
        if text is None:
            monkeypatch.delenv(f"FLEXIDEPTH_CUDA_{name}", raising=False)
        else:
            monkeypatch.setenv(f"FLEXIDEPTH_CUDA_{name}", text)
    able = {"can_overlap": True, "strict_router": False}
    assert open_forms(None, None, **able) == list(forms)
    assert open_forms(False, False, **able) == [KERNELS]  # the caller before the environment
    assert OVERLAP not in open_forms(True, None, can_overlap=False, strict_router=False)


def test_what_cannot_be_asked(make, monkeypatch):
    for name in ("OVERLAP", "PERSISTENT"):
        monkeypatch.setenv(f"FLEXIDEPTH_CUDA_{name}", "yes")
        with pytest.raises(ValueOutOfRangeError, match=rf"{name} is 'yes'; wanted 0 or 1"):
            make(tiny_model(tiny_config()), overlap=None, persistent=None)
        monkeypatch.delenv(f"FLEXIDEPTH_CUDA_{name}")
    monkeypatch.setenv("FLEXIDEPTH_CUDA_PERSISTENT", "1")
    with pytest.raises(UnsupportedError, match="takes a folded router"):
        make(tiny_model(tiny_config()), persistent=None, strict_router=True)
    monkeypatch.delenv("FLEXIDEPTH_CUDA_PERSISTENT")
    strict = make(tiny_model(tiny_config()), persistent=None, strict_router=True)
    assert PERSISTENT not in strict.forms


def test_large_models_are_not_measured(make, ids, launched, monkeypatch):
    """But for whether kernels overlap, which pays whatever the size."""
    monkeypatch.setattr(cuda_choice, "MOST_LAYER_BYTES", 1000)
    engine = make(tiny_model(tiny_config()), persistent=None)
    ahead(engine, [ids[:3]], [1], 2, Sampling())
    assert set(launched) == {KERNELS} and engine.pass_choices == []
    assert PERSISTENT not in make(tiny_model(tiny_config()), overlap=None, persistent=None).forms


def test_a_layers_bytes_are_what_counts():
    half = MOST_LAYER_BYTES // 2
    fits = {"model.layers.3.a": half, "model.layers.3.b": half, "lm_head.weight": 10**10}
    assert may_pay({**fits, "model.layers.13.a": half})
    assert not may_pay({**fits, "model.layers.3.c": 1})


@needs_script
@pytest.mark.parametrize("form", [OVERLAP, PERSISTENT])
@pytest.mark.parametrize("error", [UnsupportedError, RuntimeError])
def test_a_form_that_is_refused(scripted, ids, monkeypatch, form, error):
    queue = DecodeState._launch_pass

    def refused(state, pages, routing, own):
        if own is form:
            raise error("no room")
        queue(state, pages, routing, own)

    monkeypatch.setattr(DecodeState, "_launch_pass", refused)
    engine = scripted(2.0, 1.0)
    assert len(ahead(engine, [ids[:3]], [1], 2, Sampling())) == 2
    (choice,) = engine.pass_choices
    (other,) = {OVERLAP, PERSISTENT} - {form}
    assert choice.chosen is other and choice.said == {form.value: "no room"}


@needs_script
def test_a_form_that_computes_something_else(scripted, make, ids, monkeypatch):
    """It would be the fastest, and is not taken."""
    queue = DecodeState._launch_pass

    def wrong(state, pages, routing, form):
        queue(state, pages, routing, form)
        if form is OVERLAP:
            calls = state.engine.runtime.module
            calls.launch(state.logits.mul_, 1.0 + 2**-20)

    monkeypatch.setattr(DecodeState, "_launch_pass", wrong)
    engine = scripted(2.0, 1.0, 3.0)
    other = make(tiny_model(tiny_config()))
    got = ahead(engine, [ids[:3]], [1], 3, Sampling())
    assert_same(got, plain(other, [ids[:3]], [1], 3, Sampling()))
    (choice,) = engine.pass_choices
    assert choice.chosen is KERNELS
    assert choice.said == {"overlap": "gives other results than kernels on this device"}


@needs_script
def test_the_plain_form_has_to_run(scripted, ids, monkeypatch):
    def refused(*_):
        raise RuntimeError("no device")

    monkeypatch.setattr(DecodeState, "_launch_pass", refused)
    with pytest.raises(RuntimeError, match="no device"):
        ahead(scripted(1.0), [ids[:3]], [1], 2, Sampling())


def test_a_closed_engine_keeps_no_table(make):
    engine = make(tiny_model(tiny_config()), persistent=True)
    assert isinstance(engine._layer_table, torch.Tensor)
    engine.close()
    assert engine._layer_table is None
