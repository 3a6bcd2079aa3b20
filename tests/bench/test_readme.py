"""The README's tables are those of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flexidepth.bench.breakdown import PARTS
from flexidepth.bench.quality_tables import (
    bytes_table,
    quality_table,
    tasks_table,
    variant_tasks_table,
)
from flexidepth.bench.readme import KINDS, PAGES, tables
from flexidepth.bench.results_file import read_results
from flexidepth.bench.rows import DENSE
from flexidepth.bench.speed_tables import breakdown_table, decode_table, prompt_table
from flexidepth.errors import CheckpointError

from .rows import decode_row

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    kinds = set(re.findall(r"<!-- table (\w+):", text))
    assert kinds and kinds <= set(KINDS)
    made = tables(text, (ROOT / page).parent)
    assert made == text, "python -m flexidepth.bench.readme writes them anew"


def test_every_page_with_tables_is_known() -> None:
    found = [
        page.relative_to(ROOT).as_posix()
        for folder in (ROOT, ROOT / "docs", *(ROOT / "python_api/flexidepth/pretrained").iterdir())
        for page in folder.glob("*.md")
        if "<!-- table " in page.read_text(encoding="utf-8")
    ]
    assert sorted(found) == sorted(PAGES)


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


def test_noisy_rates_are_said_to_be() -> None:
    path = ROOT / "bench/results/intel-xeon-amx-2-cores/bench.json"
    noisy = {row.noisy for row in read_results(path).rows if row.batch == 1 and row.tps_median}
    assert noisy == {True, False}
    text = prompt_table(path) + decode_table(path)
    for row in read_results(path).rows:
        if row.kind == "prompt" and row.batch == 1 and row.tps_median is not None:
            assert (f"{row.tps_median:,.0f} (noisy)" in text) is row.noisy


def test_quality_shows_equal_counts_and_the_dial(tmp_path: Path) -> None:
    def row(part: str, method: str, skipped: float, value: float) -> dict[str, object]:
        figures = {"part": part, "method": method, "asked": 4.0, "subject": "prose"}
        return {**figures, "skipped": skipped, "ratio": value, "acc_norm": value / 10}

    points = (("flexidepth", 3.9, 1.2), ("dial", 2.5, 1.1), ("shortgpt", 4, 2.0))
    rows = [row(part, *point) for part in ("text", "task") for point in points]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    text = quality_table(tmp_path / "x.json")
    assert text.startswith("| layers skipped, asked | 4 |")
    assert "| trained routers: prose | 1.20 at 3.9 |" in text
    assert "| the dial, as asked by users: prose | 1.10 at 2.5 |" in text
    assert "all layers: prose | 2.00 |" in text
    assert "| the dial | 11.0 |" in tasks_table(tmp_path / "x.json")


def test_variants_stand_side_by_side_at_their_bytes(tmp_path: Path) -> None:
    rows = [
        {"part": "text", "method": m, "asked": n, "subject": s, "ratio": r, "bytes_per_token": b}
        for m, n, s, r, b in (
            ("base", 0.0, "prose", 1.0, 269e6),
            ("flexidepth", 1.0, "prose", 1.234, 264.6e6),
            ("flexidepth", 2.0, "prose", 1.5, 259e6),
            ("no adapter", 1.0, "prose", 12.34, 263e6),
            ("no adapter", 1.0, "code", 7.0, 263e6),
        )
    ]
    rows += [
        {"part": "task", "method": m, "asked": n, "subject": s, "acc_norm": a}
        for m, n, s, a in (
            ("base", 0.0, "x", 0.5),
            ("base", 0.0, "y", 0.3),
            ("attention only", 1.0, "x", 0.4),
            ("attention only", 1.0, "y", 0.2),
        )
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    assert bytes_table(tmp_path / "x.json", "prose").splitlines()[::2] == [
        "| layers to skip | 1 | 2 |",
        "| whole (adapter ffn/8, last 15 layers) | 1.23 at 265 | 1.50 at 259 |",
    ]
    assert "| no adapter | 12.3 at 263 | - |" in bytes_table(tmp_path / "x.json", "prose")
    assert variant_tasks_table(tmp_path / "x.json").splitlines()[::2] == [
        "| layers to skip (base model: 40.0 %) | 1 |",
        "| attention alone is skipped | 30.0 |",
    ]


def test_a_breakdown_says_where_time_is_saved(tmp_path: Path) -> None:
    def layer(name: str, count: int, feed_forward: float, by_bytes: float) -> dict[str, object]:
        parts = {**dict.fromkeys(PARTS, 0.01), "feed-forward": feed_forward}
        return {"layer": name, "count": count, "parts": parts, "by_bytes": by_bytes}

    breakdown = {
        "model": "a $model$",
        "dtype": "bfloat16",
        "threads": 2,
        "depth": 8,
        "layers": [
            layer("plain", 3, 0.15, 0.18),
            layer("run", 2, 0.15, 0.18),
            layer("plain, others skipped", 3, 0.14, 0.18),
            layer("skipped", 2, 0.0, 0.03),
        ],
        "head_ms": [1.0, 0.9],
        "other_ms": [0.1, 0.1],
    }
    rows = [decode_row("skip 0", 10.0, 0), decode_row("skip 2", 9.5, 2)]
    content = {
        "format": "flexidepth-bench-3",
        "rows": [row.to_dict() for row in rows],
        "machine": {"commit": "x"},
        "models": {"m": {"num_layers": 4, "routed_layers": 2}},
        "breakdown": [breakdown],
        "read_bandwidth_gb_per_s": {},
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    text = breakdown_table(tmp_path / "x.json")
    assert "| run | 2 | 10.0 | 10.0 | 10.0 | 10.0 | 150.0 | 10.0 | 200.0 | 180.0 |" in text
    assert "| LM head, others skipped | 2 |  |  |  |  |  |  | 900.0 |  |" in text
    assert (
        "On 2 threads skipping all 2 saves 0.43 ms of a token (0.50 in the table of decoding), where their bytes are "
        "worth 0.30 at the dense pass's rate: 0.30 in the skipped layers, 0.10 in the LM head, 0.00 elsewhere, 0.03 in "
        "the layers that always run."
    ) in text


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no table 'other'; wanted one of quality, tasks"):
        tables("<!-- table other: x.json -->\n<!-- end -->", tmp_path)
    (tmp_path / "x.json").write_text("[]")
    for kind in KINDS:
        with pytest.raises(CheckpointError):
            tables(f"<!-- table {kind}: x.json -->\n<!-- end -->", tmp_path)
