"""What other programs took meanwhile, and what that does to a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexidepth.bench import bandwidth, load
from flexidepth.bench.load import OtherPrograms
from flexidepth.bench.options import BenchOptions, Setting
from flexidepth.bench.peer_set import PeerSet
from flexidepth.bench.report import markdown, tables
from flexidepth.checkpoints import open_checkpoint

from .rows import decode_row


def clock(monkeypatch: pytest.MonkeyPatch, *readings: tuple[float, float, float] | None) -> None:
    turns: Iterator[tuple[float, float, float] | None] = iter(readings)
    monkeypatch.setattr(load, "_now", lambda: next(turns))


def test_our_own_time_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten seconds, in which the machine worked for 18 processor seconds, we for 15.
    clock(monkeypatch, (100.0, 50.0, 7.0), (110.0, 68.0, 22.0))
    assert OtherPrograms().cores() == pytest.approx(0.3)


def test_what_cannot_be_told_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, (1.0, 0.0, 0.0), (1.05, 1.0, 0.0))
    assert OtherPrograms().cores() is None
    clock(monkeypatch, None, (1.0, 0.0, 0.0))
    assert OtherPrograms().cores() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system has no /proc")
def test_the_system_s_counters_are_read() -> None:
    first, second = load._now(), load._now()
    assert first is not None and second is not None
    assert all(a <= b for a, b in zip(first, second, strict=True))
    assert first[1] > 0 and first[2] > 0


def test_noisy_rows_are_marked() -> None:
    rows = [
        decode_row("dense", 10.0, others_cores=0.05),
        decode_row("skip 1", 9.0, 1, others_cores=0.2),
    ]
    assert [row.noisy for row in rows] == [False, True]
    ((_, group, columns),) = tables(rows)
    lines = markdown(group, columns).splitlines()
    assert lines[2].startswith("| dense |") and lines[3].startswith("| skip 1 (noisy) |")
    assert [row.to_dict()["noisy"] for row in rows] == [False, True]
    # A block that something else disturbed.
    assert decode_row("dense", 10.0, samples=[0.01, 0.01, 0.012, 0.01]).noisy
    assert not decode_row("dense", 10.0, samples=[0.01, 0.01, 0.0105, 0.01]).noisy


def test_bandwidth_is_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BYTES", 1 << 20)
    times = iter([0.0, 2.0, 10.0, 10.5, 20.0, 21.0, 30.0, 31.0, 40.0, 41.0])
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(times))
    assert bandwidth.read_bandwidth(1) == pytest.approx((1 << 20) / 0.5 / 1e9)


def test_peers_that_cannot_run_are_reasons(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flexidepth.bench.peers import PEERS
    from flexidepth.bench.peers.base import PeerUnavailable

    def refuse(_: object) -> None:
        raise PeerUnavailable("it is not there")

    for name in PEERS:
        monkeypatch.setitem(PEERS, name, refuse)
    options = BenchOptions(models=["m"], prompts=[], depths=[4], steps=8, peers=["all"])
    setting = Setting("m", "cpu", next(iter(options.settings(1))).dtype, 1)
    peers = PeerSet(options, open_checkpoint(model), setting, lambda _: None)
    peers.choose(1)
    assert peers.reasons == dict.fromkeys(PEERS, "it is not there")
    assert peers.decode_cases(4) == [] and peers.prompt_cases(8) == []
