"""Figures of a result hold its rows."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from flexidepth.bench.breakdown import PARTS
from flexidepth.bench.figures import breakdown_figure, decode_figure, figures, prompt_figure
from flexidepth.bench.results_file import read_results
from flexidepth.bench.rows import with_comparisons
from flexidepth.errors import CheckpointError
from flexidepth.plots import save_figure
from tests.cli.conftest import Command

from .rows import decode_row, decode_rows, loaded, prompt_rows

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
BREAKDOWN = {
    "model": "m",
    "dtype": "bfloat16",
    "threads": 2,
    "depth": 8,
    "layers": [
        {
            "layer": "run",
            "count": 2,
            "parts": {part: 0.001 * i for i, part in enumerate(PARTS)},
            "by_bytes": 0.01,
        },
        {"layer": "skipped", "count": 2, "parts": dict.fromkeys(PARTS, 0.002), "by_bytes": 0.01},
    ],
    "head_ms": [1.0, 1.0],
    "other_ms": [0.1, 0.1],
}


@pytest.mark.filterwarnings("error")
def test_our_line_the_ideal_and_the_peer() -> None:
    ours, ideal, peer = decode_figure(loaded(decode_rows())).axes[0].lines
    assert list(ours.get_xdata()) == [0, 15]
    assert ours.get_ydata() == pytest.approx([1e3 / 10.1, 1e3 / 6.5])
    assert ideal.get_ydata() == pytest.approx([99.5, 153.1])
    assert peer.get_ydata() == pytest.approx([50.0, 50.0])


def test_what_mere_reads_allow_is_a_line_of_its_own() -> None:
    rows = decode_rows(given=10.0)
    rows = with_comparisons([replace(r, given=11.0) if r.name == "skip 15" else r for r in rows])
    _, _, reads, _ = decode_figure(loaded(rows)).axes[0].lines
    assert reads.get_label() == "by reads, 2 threads"
    assert reads.get_ydata() == pytest.approx([99.5, 153.1 * 1.1])


def test_lines_are_told_apart_by_what_differs() -> None:
    rows = [*decode_rows(), *decode_rows(batch=4), *decode_rows(test="tg4 @ d2048")]
    labels = [line.get_label() for line in decode_figure(loaded(rows)).axes[0].lines]
    named = [label for label in labels if label.startswith("2 threads")]
    assert named == [
        f"2 threads, {batch} sequences, {test}"
        for batch, test in ((1, "tg4 @ d8"), (4, "tg4 @ d8"), (1, "tg4 @ d2048"))
    ]
    # Of four sequences a step gives four tokens.
    fourth = decode_figure(loaded(rows)).axes[0].lines[3]
    assert fourth.get_ydata() == pytest.approx([4e3 / 10.1, 4e3 / 6.5])


def test_prompts_go_by_the_share_skipped(tmp_path: Path) -> None:
    figure = prompt_figure(loaded(prompt_rows()))
    ours, ideal, star = figure.axes[0].lines
    assert list(ours.get_xdata()) == [0, 100] and list(ours.get_ydata()) == [0.8, 0.5]
    assert ideal.get_ydata() == pytest.approx([0.8, 0.5]) and list(star.get_ydata()) == [0.8]
    save_figure(figure, tmp_path / "prompt.svg")


def test_a_bar_for_each_kind_of_layer() -> None:
    axis = breakdown_figure(loaded([], breakdown=[BREAKDOWN])).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "run, 2 threads, d8",
        "skipped, 2 threads, d8",
    ]
    widths = [[bar.get_width() for bar in container] for container in axis.containers]
    assert widths == [pytest.approx([float(i), 2.0]) for i in range(len(PARTS))]


def test_what_a_result_lacks_is_not_drawn() -> None:
    assert figures(loaded([])) == {}
    assert list(figures(loaded(decode_rows()))) == ["decode"]
    said = dataclasses.replace(decode_row("dense", None), said="no memory")
    for make in (decode_figure, prompt_figure, breakdown_figure):
        with pytest.raises(CheckpointError, match="plot: the benchmark has no"):
            make(loaded([said]))


@pytest.mark.parametrize("figure", ["decode", "prompt"])
def test_committed_results_of_every_format_are_drawn(
    run: Command,
    tmp_path: Path,
    figure: str,
) -> None:
    for source in RESULTS.glob("*/bench.json"):
        out = tmp_path / f"{source.parent.name}-{figure}.svg"
        result = run("bench", "plot", source, "--figure", figure, "-o", out)
        assert result.exit_code == 0, result.output
        assert out.stat().st_size > 1000
        rows = read_results(source).rows
        assert {row.kind for row in rows} == {"decode", "prompt"}
        for row in rows:
            if row.skip_asked is not None:
                assert row.of_ideal == pytest.approx(row.speedup / row.ideal)


def test_other_figures_are_refused(run: Command, tmp_path: Path) -> None:
    result = run("bench", "plot", tmp_path, "-o", "x.svg", "--figure", "pie")
    assert result.exit_code == 2 and "wanted decode, prompt, breakdown" in result.stderr
