"""The command, what it writes, and that page, JSON and measurements say the same."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner, Result

from flexidepth.bench.scaling.__main__ import FILES, main, write_study
from flexidepth.bench.scaling.figures import error_figure
from flexidepth.bench.scaling.findings import findings
from flexidepth.bench.scaling.measured import read_measured
from flexidepth.bench.scaling.page import with_blocks, write_page
from flexidepth.bench.scaling.recorded import read_recording
from flexidepth.bench.scaling.report import blocks, report
from flexidepth.bench.scaling.study import half, make_study
from flexidepth.errors import DataError
from flexidepth.plain_json import json_text

from .conftest import ROOT

PAGE = ROOT / "docs" / "scaling.md"
AGAIN = "run python -m flexidepth.bench.scaling and commit what it writes"


def run(*arguments: object) -> Result:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def same(one: Any, other: Any, place: str = "") -> None:
    """Equal, numbers to nine digits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), f"{place}: {AGAIN}"
        for key in one:
            same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), f"{place}: {AGAIN}"
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{place}[{number}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-9, nan_ok=True), f"{place}: {AGAIN}"
    else:
        assert one == other, f"{place}: {AGAIN}"


def test_the_committed_study_is_of_the_committed_measurements(
    results: Path, committed: dict[str, Any]
) -> None:
    recording = read_recording(results / "scaling" / "routing.json")
    made = make_study(read_measured(results), recording)
    same(json.loads(json_text(made, indent=1)), committed)


def test_the_page_says_what_the_committed_study_says(
    results: Path, committed: dict[str, Any]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_blocks(text, blocks(committed)) == text, AGAIN
    tables = (results / "scaling" / "scaling.md").read_text(encoding="utf-8")
    assert tables == report(committed) + "\n", AGAIN


def test_files_that_the_page_shows_are_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGE.read_text(encoding="utf-8"))
    assert sum(link.endswith(".svg") for link in links) == 3
    for link in links:
        assert (PAGE.parent / link).is_file(), link


@pytest.fixture
def inputs(tmp_path: Path, results: Path) -> Path:
    """Results with the committed recording and one unknown file."""
    folder = tmp_path / "results"
    (folder / "scaling").mkdir(parents=True)
    (folder / "unknown").mkdir()
    recorded = (results / "scaling" / "routing.json").read_text(encoding="utf-8")
    (folder / "scaling" / "routing.json").write_text(recorded, encoding="utf-8")
    (folder / "unknown" / "bench.json").write_text('{"format": "other"}', encoding="utf-8")
    for path in results.glob("intel*/bench.json"):
        (folder / path.parent.name).mkdir()
        (folder / path.parent.name / "bench.json").write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A copy of the page."""
    path = tmp_path / "page.md"
    path.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_the_command_writes_tables_figures_and_the_page(
    inputs: Path, page: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run("--results", inputs, "--output-dir", out, "--page", page)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    study = json.loads((out / "scaling.json").read_text(encoding="utf-8"))
    machines = {one["machine"] for one in study["measured"]["series"]}
    assert machines == {"intel-xeon-amx-2-cores"}
    text = page.read_text(encoding="utf-8")
    assert with_blocks(text, blocks(study)) == text
    for where in (result.stdout, text, (out / "scaling.md").read_text(encoding="utf-8")):
        assert "- unknown/bench.json: its format is 'other'" in where
    for name in FILES:
        if name.endswith(".svg"):
            assert ElementTree.parse(out / name).getroot().tag.endswith("}svg")


def test_without_matplotlib_everything_but_the_figures_is_written(
    committed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    for name in FILES:
        (tmp_path / name).write_text("of the run before", encoding="utf-8")
    monkeypatch.setattr(builtins, "__import__", missing)
    paths = write_study(committed, tmp_path)
    # Its figures would belong to other values.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scaling.json", "scaling.md"]
    assert [path.name for path in paths] == ["scaling.json", "scaling.md"]


def test_what_is_missing_is_said(tmp_path: Path, inputs: Path, page: Path) -> None:
    result = run("--results", tmp_path / "none")
    assert result.exit_code == 1 and "none is no directory" in result.stderr
    (inputs / "scaling" / "routing.json").write_text("{}")
    result = run("--results", inputs, "--page", page)
    assert result.exit_code == 1 and "not a recording of decisions" in result.stderr


def test_a_study_without_measurements_has_words_and_figures(
    committed: dict[str, Any],
) -> None:
    nothing = {"series": [], "refused": [], "pooled": {"decode": {}, "prompt": {}}}
    study = {**committed, "measured": nothing}
    assert "The measured ones" in findings(committed)
    assert "The measured ones" not in findings(study)
    assert "No file of measurements was left out" in blocks(study)["errors"]
    assert [axis.get_legend() for axis in error_figure(study).axes] == [None, None]


def test_a_page_with_other_markers_stops_the_command_before_it_writes(
    inputs: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- scaling: errors -->\n<!-- end -->\n", encoding="utf-8")
    out = tmp_path / "out"
    result = run("--results", inputs, "--output-dir", out, "--page", page)
    assert result.exit_code == 1 and "the page has the blocks errors" in result.stderr
    assert not out.exists() or not list(out.iterdir())


def test_blocks_are_exchanged_and_the_rest_stays() -> None:
    text = "a\n<!-- scaling: one -->\nold\n<!-- end -->\nb\n<!-- scaling: two -->\n<!-- end -->\n"
    wanted = "a\n<!-- scaling: one -->\n\nx \\1\n\n<!-- end -->\nb\n<!-- scaling: two -->\n\ny\n\n<!-- end -->\n"
    made = with_blocks(text, {"one": "x \\1", "two": "y"})
    assert made == wanted
    assert with_blocks(made, {"one": "x \\1", "two": "y"}) == made


@pytest.mark.parametrize(
    "text",
    [
        "no blocks",
        "<!-- scaling: one -->\n<!-- end -->\n",
        "<!-- scaling: one -->\n<!-- end -->\n<!-- scaling: three -->\n<!-- end -->\n",
        "<!-- scaling: one -->\n<!-- scaling: two -->\n<!-- end -->\n",
        "<!-- scaling: one -->\n<!-- end -->\n<!-- scaling: two -->\nand on",
    ],
)
def test_a_page_with_other_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="wanted each of one, two once"):
        write_page(path, {"one": "x", "two": "y"})
    assert path.read_text(encoding="utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["page.md"]


def test_what_does_not_fit_has_a_size_and_no_speed(committed: dict[str, Any]) -> None:
    rows = committed["decode"]
    models, devices = committed["models"], committed["devices"]
    assert len(rows) == len(models) * len(devices) * 5 and len(models) == len(devices) == 4
    memory = {device["name"]: device["memory"] for device in devices}
    for row in rows:
        assert row["fits"] == (row["resident_gb"] <= memory[row["device"]])
        assert ("speedup" in row) == row["fits"]
    table = blocks(committed)["speeds"]
    assert "needs 145 GB" in table
    assert sum(not row["fits"] for row in rows) == 12


def test_half_of_an_odd_number_of_layers_lies_between_two() -> None:
    assert half([1.0, 2.0, 4.0]) == 2.0
    assert half([1.0, 2.0, 4.0, 8.0]) == 3.0
