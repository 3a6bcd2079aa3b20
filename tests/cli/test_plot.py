"""flexidepth plot and the figures behind it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
import torch

from flexidepth import RoutingReport
from flexidepth.errors import CheckpointError, FlexiDepthError, ValueOutOfRangeError
from flexidepth.plots import routing_figure, save_figure
from tests.cli.conftest import Command

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def routing_report(tokens: int = 6, prompt: int = 2) -> RoutingReport:
    torch.manual_seed(0)
    ran = torch.randint(0, 2, (tokens, 3), dtype=torch.uint8)
    texts = [" a", "\n", "$x$", "\x1b", "語", " end"] * tokens
    return RoutingReport(texts[:tokens], ran, ran.float(), [1, 2, 5], 6, prompt, "router")


@pytest.mark.filterwarnings("error")
def test_png_and_svg_are_what_they_say(run: Command, report: Path, tmp_path: Path) -> None:
    png, svg = tmp_path / "routing.png", tmp_path / "routing.SVG"
    for out in (png, svg):
        result = run("plot", report, "-o", out)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{out}\n"
        assert result.stderr == ""
    picture = matplotlib.image.imread(png)
    assert picture.ndim == 3
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("name", ["a.svg", "a.png"])
def test_the_same_figure_gives_the_same_file(tmp_path: Path, name: str) -> None:
    contents = set()
    for _ in range(2):
        figure = routing_figure(routing_report())
        contents.add(save_figure(figure, tmp_path / name).read_bytes())
    assert len(contents) == 1


@pytest.mark.filterwarnings("error")
def test_heat_map_holds_the_decisions(tmp_path: Path) -> None:
    report = routing_report()
    figure = routing_figure(report)
    top, bottom = figure.axes
    assert np.array_equal(top.images[0].get_array(), report.ran.T.numpy())
    assert [label.get_text() for label in bottom.get_xticklabels()] == [
        " a",
        "\\n",
        r"\$x\$",
        "\\x1b",
        "語",
        " end",
    ]
    assert bottom.lines[0].get_ydata().tolist() == report.layers_used
    rates = [label.get_text() for label in top.get_yticklabels()]
    assert rates == [f"{n}  ({rate:.0%} skip)" for n, rate in report.skip_rate.items()]
    assert [line.get_xdata()[0] for line in top.lines] == [1.5]  # prompt | answer
    save_figure(figure, tmp_path / "routing.png")  # no maths, no warning about the font


def test_long_reports_show_their_end(tmp_path: Path) -> None:
    figure = routing_figure(routing_report(tokens=400), max_tokens=5)
    assert figure.axes[0].images[0].get_array().shape == (3, 5)
    wide = routing_figure(routing_report(tokens=4000), max_tokens=4000)
    assert wide.get_figwidth() * 150 < 2**16  # the largest picture that can be drawn


def test_a_benchmark_is_drawn_too(run: Command, tmp_path: Path) -> None:
    for source in RESULTS.glob("*/bench.json"):
        result = run("plot", source, "-o", tmp_path / "bench.svg")
        assert result.exit_code == 0, result.output
        assert ElementTree.parse(tmp_path / "bench.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("content", ["{", "[1]", "3", '{"format": "other"}', "{}"])
def test_other_files_are_refused(run: Command, tmp_path: Path, content: str) -> None:
    source = tmp_path / "x.json"
    source.write_text(content, encoding="utf-8")
    result = run("plot", source, "-o", tmp_path / "x.png")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "unexpected" not in result.stderr
    assert not (tmp_path / "x.png").exists()


def test_reports_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueOutOfRangeError, match="0 tokens"):
        routing_figure(routing_report(tokens=0))
    with pytest.raises(ValueOutOfRangeError, match="max_tokens is 0"):
        routing_figure(routing_report(), max_tokens=0)
    report = routing_report()
    report.tokens.append("one more")
    with pytest.raises(CheckpointError, match="7 tokens and 6 rows"):
        routing_figure(report)


def test_ending_is_checked_before_anything_is_drawn(run: Command, tmp_path: Path) -> None:
    result = run("plot", tmp_path / "missing.json", "-o", tmp_path / "x.jpg")
    assert result.exit_code == 1
    assert "wanted a name that ends in .png or .svg" in result.stderr
    assert run("plot", tmp_path / "missing.json", "-o", tmp_path / "x.png").stderr == (
        f"error: {tmp_path / 'missing.json'}: No such file or directory\n"
    )


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def absent(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(FlexiDepthError, match=r"pip install flexidepth\[plot\]"):
        routing_figure(routing_report())
