"""The stopwatch of training steps: every part is counted once, and nothing stays wrapped."""

from __future__ import annotations

import json

import pytest

from flexidepth.bench import training_step
from flexidepth.bench.training_step import NOT_TAKEN, Stopwatch, time_steps
from flexidepth.layers import DecoderLayer
from flexidepth.training import command

from .runs import BUDGETS, LENGTH, recipe


def test_outer_names_stand_still(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(training_step, "_now", lambda: next(clock))
    watch = Stopwatch()
    with watch.running("outer"):
        with watch.running("inner"):
            assert watch.inside("outer")
        with watch.running("inner"):
            pass
    assert watch.seconds == {"outer": 1.0 + 3.0 + 5.0, "inner": 2.0 + 4.0}


def test_parts_of_a_step(base, data, monkeypatch):
    monkeypatch.setattr(command, "load_data", lambda *_: data)
    before = DecoderLayer.forward
    plan = recipe(base, BUDGETS)
    times = time_steps(plan, 3, lambda _: None)
    assert DecoderLayer.forward is before
    assert (times.steps, times.tokens) == (3, 3 * 4 * LENGTH)
    assert set(times.seconds) == {
        *("rest of the step", "base model's own pass", "path taken", "layers that are not routed"),
        *(NOT_TAKEN, "head and loss", "backward", "optimiser"),
    }
    assert min(times.seconds.values()) > 0
    told = json.loads(json.dumps(times.to_dict()))
    assert sum(told["shares"].values()) == pytest.approx(1, abs=1e-2)
