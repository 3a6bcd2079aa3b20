"""bench compare: slower than the noise of both runs, or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexidepth.bench.compare import compare
from flexidepth.bench.results_file import read_results
from flexidepth.bench.rows import with_comparisons
from tests.cli.conftest import Command

from .rows import decode_row, decode_rows, loaded

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_the_same_result_has_not_changed() -> None:
    found = compare(loaded(decode_rows()), loaded(decode_rows()))
    assert [change.name for change in found.changes] == ["dense", "skip 15", "skip 0"]  # no peers
    assert all(change.change == 0 and not change.slower for change in found.changes)
    assert not found.ratios and not found.missing


@pytest.mark.parametrize(
    ("after", "verdict"), [(10.2, ""), (10.4, "SLOWER"), (9.8, ""), (9.5, "faster")]
)
def test_three_per_cent_are_allowed_where_nothing_varies(after: float, verdict: str) -> None:
    (change,) = compare(
        loaded([decode_row("dense", 10.0)]), loaded([decode_row("dense", after)])
    ).changes
    assert change.verdict == verdict and change.allowed == 0.03


def test_noise_of_the_rounds_is_allowed_for() -> None:
    noisy = decode_row("dense", 10.0, samples=[0.009, 0.010, 0.010, 0.011])
    slower = decode_row("dense", 10.8, samples=[0.0108] * 4)
    (change,) = compare(loaded([noisy]), loaded([slower])).changes
    # Rounds vary by 8.2 %, the median of four of them by half of that.
    assert change.allowed == pytest.approx(3 * 0.0816497 / 2, rel=1e-4)
    assert change.change == pytest.approx(0.08) and not change.slower


@pytest.mark.parametrize(("given", "verdict"), [(18.0, ""), (20.0, "SLOWER"), (16.0, "faster")])
def test_what_the_memory_did_is_taken_off(given: float, verdict: str) -> None:
    """Of a virtual machine others take a part of memory and cache: a mere read shows how much."""
    before = decode_row("dense", 9.0, given=20.0, work_share=1.1)
    after = decode_row("dense", 10.0, given=given)
    (change,) = compare(loaded([before]), loaded([after])).changes
    assert change.change == pytest.approx(1 / 9) and change.memory == pytest.approx(20 / given - 1)
    assert change.own == pytest.approx(given / 18 - 1) and change.verdict == verdict
    (unknown,) = compare(loaded([before]), loaded([decode_row("dense", 10.0)])).changes
    assert unknown.memory == 0 and unknown.slower
    pair = (with_comparisons([row]) for row in (before, after))
    elsewhere = compare(loaded(next(pair)), loaded(next(pair), cpu="another"))
    assert elsewhere.changes[0].memory == 0


def test_memory_counts_by_its_part_and_its_noise() -> None:
    before = decode_row("dense", 10.0, given=20.0, work_share=0.25, given_noise=0.08)
    after = decode_row("dense", 10.0, given=18.0, given_noise=0.08)
    (change,) = compare(loaded([before]), loaded([after])).changes
    assert change.memory == pytest.approx(0.25 * (20 / 18 - 1))
    # Two medians of four rounds each, a quarter of the reads' noise in either.
    assert change.allowed == pytest.approx(3 * 0.25 * 0.08 / 2 * 2**0.5)


def test_steps_of_a_round_are_no_rounds() -> None:
    row = decode_row("dense", 10.0, samples=[0.009, 0.011] * 4, blocks=[2] * 4)
    assert row.noise == 0


def test_other_machines_are_compared_by_speed_over_dense() -> None:
    fast = with_comparisons([decode_row("dense", 5.0), decode_row("skip 4", 4.0, 4)])
    slow = with_comparisons([decode_row("dense", 50.0), decode_row("skip 4", 45.0, 4)])
    found = compare(loaded(fast), loaded(slow, cpu="another"))
    assert found.ratios
    assert [(c.name, c.before, c.after) for c in found.changes] == [
        ("dense", 1.0, 1.0),
        ("skip 4", pytest.approx(0.8), pytest.approx(0.9)),
    ]
    assert [change.name for change in found.slower] == ["skip 4"]


def test_missing_rows_are_named() -> None:
    found = compare(loaded(decode_rows()), loaded(decode_rows()[:1]))
    assert found.missing == [f"a $model$ bfloat16 cpu 2t tg4 @ d8: skip {n}" for n in (15, 0)]


def test_the_command(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = RESULTS / "intel-xeon-amx-2-cores"
    result = run("bench", "compare", committed, committed / "bench.json")
    assert result.exit_code == 0, result.output
    count = sum(not row.peer for row in read_results(committed).rows)
    assert len(result.stdout.splitlines()) == 1 + count and "SLOWER" not in result.stdout
    pair = {"a": loaded([decode_row("dense", 10.0)]), "b": loaded([decode_row("dense", 11.0)])}
    monkeypatch.setattr("flexidepth.bench.results_file.read_results", lambda path: pair[path.name])
    result = run("bench", "compare", "a", "b")
    assert result.exit_code == 1 and "SLOWER" in result.stdout
    assert "1 of 1 rows got slower by more than noise" in result.stderr
    assert run("bench", "compare", "b", "a").exit_code == 0
    monkeypatch.undo()
    (tmp_path / "x.json").write_text('{"format": "flexidepth-bench-2"}')
    result = run("bench", "compare", tmp_path / "x.json", tmp_path / "x.json")
    assert result.exit_code == 1 and "is no result of a benchmark" in result.stderr
