"""Cases in turn: their order, what counts, what a failure ends; never a time."""

from __future__ import annotations

import pytest

from flexidepth.bench.timing import Case, alternate


def test_cases_take_turns_and_the_first_steps_do_not_count() -> None:
    order: list[str] = []
    cases = [
        Case(name, lambda n=name: order.append(n), lambda n=name: order.append(n.upper()))  # type: ignore[misc]
        for name in "ab"
    ]
    said: list[str] = []
    cases[0].after = lambda: order.append("-")
    spent = alternate(cases, rounds=2, steps=3, warmup=1, settle=0, progress=said.append)
    assert "".join(order) == "Aaa-BbbBbbbAaa-a-"  # another one begins each turn
    assert [len(case.samples) for case in cases] == [3, 3]
    assert [case.blocks for case in cases] == [[1, 2], [1, 2]]
    assert spent.timed == pytest.approx(sum(sum(case.samples) for case in cases))
    assert spent.harness_share == spent.between / (spent.between + spent.timed)
    assert said[0] == "round 1/2: a"


def test_a_block_begins_anew_once_caches_are_steady() -> None:
    order: list[str] = []
    case = Case("a", lambda: order.append("a"), lambda: order.append("A"))
    case.after = lambda: order.append("-")
    alternate([case], rounds=2, steps=2, steady=3, warmup=1, settle=0)
    assert "".join(order) == "AaaaAaa-" * 2
    assert case.blocks == [1, 1]


def test_others_code_that_fails_ends_its_case_alone() -> None:
    steps = iter(range(4))

    def fail() -> None:
        if next(steps) == 3:
            raise RuntimeError("out of luck")

    peer, own = Case("peer", fail, foreign=True), Case("own", lambda: None)
    spent = alternate([peer, own], rounds=3, steps=3, warmup=1, settle=0)
    assert peer.failed == "RuntimeError: out of luck" and not peer.samples and not peer.blocks
    assert len(own.samples) == 3 and spent.timed > 0
    with pytest.raises(StopIteration):
        alternate([Case("own", lambda: next(steps))], rounds=1, steps=1, settle=0)


def test_only_those_whose_threads_spin_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    cases = [Case("ours", lambda: None, spins=False), Case("theirs", lambda: None)]
    alternate(cases, rounds=3, steps=3, settle=0.25)
    # Ours, theirs; ours, theirs; theirs, ours: before the first block, and before each that follows one of theirs.
    assert slept == [0.25] * 4
