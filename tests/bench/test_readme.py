"""The README's tables are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flexidepth.bench.readme import KINDS, decode_table, prompt_table, tables
from flexidepth.bench.results_file import read_results
from flexidepth.bench.rows import DENSE
from flexidepth.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def test_tables_are_those_of_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table (\w+):", text)) == set(KINDS)
    assert tables(text, ROOT) == text, "python -m flexidepth.bench.readme writes them anew"


def test_a_changed_figure_is_found() -> None:
    text = README.read_text(encoding="utf-8")
    changed = text.replace("| ours, dense |", "| ours, dense now |")
    assert changed != text and tables(changed, ROOT) == text


def test_tables_of_speeds_hold_the_rows() -> None:
    for path in (ROOT / "bench" / "results").glob("*/bench.json"):
        rows = read_results(path).rows
        dense = next(r for r in rows if r.name == DENSE and r.kind == "decode")
        line = next(x for x in decode_table(path).splitlines() if x.startswith("| ours, dense |"))
        assert line.split("|")[2].strip() == f"{dense.tps_median:.1f}"
        most = max(r.skip_asked for r in rows if r.skip_asked is not None)
        assert f"| ours, {most:g} of {most:g} routed layers skipped |" in decode_table(path)
        assert "pp512, 1 thread, tok/s" in prompt_table(path)


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no table 'other'; wanted one of quality, tasks"):
        tables("<!-- table other: x.json -->\n<!-- end -->", tmp_path)
    (tmp_path / "x.json").write_text("[]")
    for kind in KINDS:
        with pytest.raises(CheckpointError):
            tables(f"<!-- table {kind}: x.json -->\n<!-- end -->", tmp_path)
