"""Reads of as many bytes as steps have."""

from __future__ import annotations

import pytest
import torch

from flexidepth.bench.ideal import bytes_per_token
from flexidepth.bench.reads import STEADY, ReadCase, Reads, steady_steps
from flexidepth.bench.rows import with_comparisons
from tests.engine.conftest import tiny_config

from .rows import decode_row


def test_a_read_is_of_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ReadCase(4001, 1)
    assert case.name == "read 0 MB" and case.data.nbytes == 4000 and bool((case.data == 1).all())
    before = torch.get_num_threads()
    case.start()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    seen: list[int] = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda data: seen.append(data.nbytes))
    case.step()
    assert seen == [4000]
    case.samples = [0.002]
    assert case.read_ms == pytest.approx(2 * 4001 / 4000)


def test_large_reads_stand_for_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexidepth.bench.reads._MOST", 1000)
    case = ReadCase(5000, 1)
    case.samples = [0.001]
    assert case.data.nbytes == 1000 and case.read_ms == 5.0
    config = tiny_config()
    (case,) = Reads(config, 2, 10, 1).cases
    assert case.nbytes == bytes_per_token(config, config.num_routed_layers, context=10)


def test_bytes_between_two_reads_lie_on_their_line() -> None:
    config = tiny_config()
    reads = Reads(config, 2, 10, 1)
    ends = [bytes_per_token(config, n, context=10) for n in (config.num_routed_layers, 0)]
    assert [case.nbytes for case in reads.cases] == ends
    for case, seconds in zip(reads.cases, (0.001, 0.005), strict=True):
        case.samples = [seconds]
    few, most = reads.cases
    assert reads.milliseconds(few.nbytes) == pytest.approx(few.read_ms)
    assert reads.milliseconds(most.nbytes) == pytest.approx(most.read_ms)
    middle = reads.milliseconds(sum(ends) / 2)
    assert middle == pytest.approx((few.read_ms + most.read_ms) / 2)
    # Outside of it a line could end below zero.
    assert reads.milliseconds(few.nbytes / 2) == pytest.approx(few.read_ms / 2)
    assert reads.milliseconds(3 * most.nbytes) == pytest.approx(3 * most.read_ms)
    for case, times in zip(reads.cases, ([1.0, 1.0], [1.0, 1.2]), strict=True):
        case.samples, case.blocks = times, [1, 1]
    assert reads.noise == pytest.approx(0.1 * 2**0.5 / 1.1)
    assert most.to_dict() == {"nbytes": most.held, "samples": [1.0, 1.2], "blocks": [1, 1]}
    before = torch.get_num_threads()
    most.threads = 1
    most.start()
    reads.close()
    assert torch.get_num_threads() == before and most.data.nbytes == 0


def test_a_model_without_routed_layers_has_one_read() -> None:
    reads = Reads(tiny_config(routing_layers=[]), 2, 0, 1)
    (case,) = reads.cases
    case.samples = [0.001]
    assert reads.milliseconds(2 * case.nbytes) == pytest.approx(2 * case.read_ms)


def test_large_models_are_steady_at_once() -> None:
    assert (steady_steps(1e6), steady_steps(1e9), steady_steps(16e9)) == (STEADY, 8, 1)


def test_the_ideal_by_reads_is_that_of_their_times() -> None:
    dense, row = with_comparisons(
        [
            decode_row("dense", 10.0, given=20.0, work_share=0.9),
            decode_row("skip 15", 6.0, 15, ideal=1.5, given=22.0, work_share=0.9),
        ]
    )
    assert dense.ideal_reads is None
    assert row.ideal_reads == pytest.approx(1.5 * 22 / 20)
    assert row.of_reads == pytest.approx(10 / 6 / (1.5 * 22 / 20))
