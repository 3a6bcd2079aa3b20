"""The same cases on the CUDA engine, behind a runtime that is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexidepth.bench.decode import decode_case, measure_decode
from flexidepth.bench.plans import dense_plan, make_plans
from flexidepth.bench.prompt import measure_prompt

from ..engine.conftest import tiny_config, tiny_model


@pytest.fixture
def engine(make: Any) -> Any:
    return make(tiny_model(tiny_config()))


def test_a_step_is_in_flight_while_one_is_read(engine: Any) -> None:
    (plan,) = make_plans("random", [1], engine.config)
    case = decode_case(engine, plan, batch=2, depth=5, steps=4)
    for _ in range(2):
        case.start()
        for _ in range(4):
            case.step()
            case.after()
            assert case.run.in_flight == 1
    masks = [plan.rows(2, 5 + i) for i in range(4)]
    assert torch.equal(torch.stack(case.decided), torch.stack(masks * 2))


def test_rows_of_a_measurement(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    plans = make_plans("random", [0, 3], engine.config)
    rows = measure_decode(engine, plans, depth=3, rounds=2, steps=4)
    assert [(r.name, r.skip_got, r.threads) for r in rows] == [
        ("dense", None, None), ("skip 0", 0, None), ("skip 3", 3, None),
    ]  # fmt: skip
    prompts = measure_prompt(engine, 9, plans, rounds=1)
    assert [r.skip_got for r in prompts] == [None, 0, 3]


def test_it_chooses_what_the_cpu_engine_chooses(engine: Any) -> None:
    case = decode_case(engine, dense_plan(), batch=1, depth=4, steps=3)
    case.start()
    seen = []
    for _ in range(3):
        case.step()
        seen.append(case.caches[0].length)
    assert seen == [6, 7, 8]  # one more is always under way
