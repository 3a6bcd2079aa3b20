"""A whole evaluation: every row, its files, what it is compared with."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import pytest

from flexidepth import FlexiDepth
from flexidepth.errors import ValueOutOfRangeError
from flexidepth.evaluation import EvalOptions, EvalResult, evaluate
from flexidepth.evaluation.data import read_data
from flexidepth.evaluation.points import METHODS
from flexidepth.evaluation.report import report_text
from flexidepth.evaluation.rows import AnswersRow, KindRow, TaskRow, TextRow

from .conftest import CALIBRATION, Make, save_tiny, sentence, write_lines


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory, model: Path, prose: Path, chat: Path, tasks: Path
) -> tuple[EvalResult, Path, list[str]]:
    """(result, folder, lines said) of a run of all parts and methods, with a further checkpoint."""
    folder = tmp_path_factory.mktemp("everything") / "results"
    wide = save_tiny(tmp_path_factory.mktemp("models") / "wide", adapter_reduction_factor=2)
    prompts = {"copy": [[{"role": "user", "content": sentence(i, 4)}] for i in range(2)]}
    options = EvalOptions(
        str(model),
        texts={"prose": prose, "chat": chat},
        tasks=tasks,
        skipped=[0, 1, 2],
        also={"wide": str(wide)},
        tokens=200,
        window=100,
        calibration_tokens=200,
        limit=6,
        answers=2,
        max_new_tokens=8,
        per_kind=2,
        kinds_skipped=1,
        dtype="float32",
        num_threads=1,
    )
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flexidepth.evaluation.data.made_prompts", lambda *_: prompts)
        return evaluate(options, output_dir=folder, notify=said.append), folder, said


def test_every_point_has_every_row(everything: tuple[EvalResult, Path, list[str]]) -> None:
    result, _, said = everything
    points = [("base", 0), *((m, n) for m in (*METHODS, "wide") for n in (0, 1, 2))]
    for part, kind, subjects in (
        ("text", TextRow, ["prose", "chat"]),
        ("task", TaskRow, ["letters", "words"]),
        ("answers", AnswersRow, [""]),
    ):
        found = {(r.method, r.asked, r.subject) for r in result.rows if isinstance(r, kind)}
        assert found == {(*point, subject) for point in points for subject in subjects}, part
    kinds = [(r.method, r.subject) for r in result.rows if isinstance(r, KindRow)]
    assert kinds == [("flexidepth", "copy"), ("wide", "copy")]
    assert any("other.jsonl is left out" in line for line in said)


def test_ablated_models_are_measured_as_others_are(
    make: Make, tmp_path: Path, model: Path, prose: Path, tasks: Path
) -> None:
    """The trainable model's figures; with nothing ablated they would be the engine's."""
    also = {
        name: str(save_tiny(tmp_path / name, ablations=[name], gate="straight_through"))
        for name in ("no_adapter", "no_skipped_kv")
    }
    said: list[str] = []
    options = make(also=also, skipped=[0, 1], methods=[], per_kind=1, tasks=tasks / "words.jsonl")
    result = evaluate(options, notify=said.append)
    found = {(r.part, r.method, r.asked) for r in result.rows if r.method in also}
    parts = ("text", "task", "answers")
    assert found == {(part, name, n) for part in parts for name in also for n in (0, 1)}
    scores = {r.method: r.acc_norm for r in result.rows if isinstance(r, TaskRow) and not r.asked}
    assert scores == dict.fromkeys(("base", *also), scores["base"])
    rows = {(r.method, r.asked): r for r in result.rows if r.key[3] == "prose"}
    answers = {(r.method, r.asked): r for r in result.rows if isinstance(r, AnswersRow)}
    for name in also:
        assert answers[name, 0].identical == 1
        assert rows[name, 0].ratio == pytest.approx(1, abs=1e-4)
        assert rows[name, 1].skipped == pytest.approx(1, abs=0.5)
        assert rows[name, 1].ratio != rows[name, 0].ratio
        assert any(f"{name}: {name}; computed by the trainable model" in line for line in said)
    with pytest.raises(ValueOutOfRangeError, match="further checkpoint"):
        evaluate(make(model=also["no_adapter"]))


def test_rows_fit_the_model(everything: tuple[EvalResult, Path, list[str]], model: Path) -> None:
    result, _, _ = everything
    rows = {
        (r.method, r.asked): r
        for r in result.rows
        if isinstance(r, TextRow) and r.subject == "prose"
    }
    base = rows["base", 0]
    assert (base.ratio, base.agreement, base.skipped, base.nats_stderr) == (1, 1, 0, 0)
    assert base.predictions == 198
    # Nothing skipped is the base model, but for multiplier gates, which weigh what runs.
    for method in METHODS[2:]:
        assert rows[method, 0].perplexity == base.perplexity
    assert rows["flexidepth", 0].ratio != 1 and rows["flexidepth", 0].skipped == 0
    for (method, asked), row in rows.items():
        assert row.ratio == pytest.approx(row.perplexity / base.perplexity)
        if method in METHODS[2:]:
            assert row.skipped == asked
    near = rows["flexidepth", 1]
    assert near.skipped == pytest.approx(1, abs=0.5)  # calibrated on other text of the same kind
    point = next(p for p in result.points if (p["method"], p["asked"]) == ("flexidepth", 1))
    found = {(e["part"], e["subject"]): e for e in point["each"]}
    assert set(found) == {
        *(("text", name) for name in ("prose", "chat")),
        *(("task", name) for name in ("letters", "words")),
        ("answers", ""),
    }
    static = next(p for p in result.points if (p["method"], p["asked"]) == ("static-adapters", 2))
    chosen = {(e["part"], e["subject"]): e["skipped"] for e in static["each"]}
    assert set(chosen) == set(found) and all(len(skipped) == 2 for skipped in chosen.values())
    for each in found.values():
        assert each["calibration_skipped"] == pytest.approx(1, abs=0.02)
        assert len(each["thresholds"]) == 3
    assert rows["wide", 1].bytes_per_token > near.bytes_per_token


def test_base_perplexity_is_that_of_score(
    everything: tuple[EvalResult, Path, list[str]], llm: FlexiDepth, prose: Path
) -> None:
    from flexidepth.evaluation.texts import read_text_set

    result, _, _ = everything
    found = read_text_set("x", prose, llm.tokenizer, tokens=200, window=100).windows
    windows = [window.ids for window in found]
    scores = llm.score(windows, force_routing="all")
    lost = sum(-float(s.logprobs.sum()) for s in scores) / 198
    base = next(r for r in result.rows if r.method == "base" and r.subject == "prose")
    assert isinstance(base, TextRow)
    assert base.perplexity == pytest.approx(math.exp(lost), rel=1e-4)


def test_files(everything: tuple[EvalResult, Path, list[str]]) -> None:
    result, folder, said = everything
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["eval.json", "eval.md", "eval.png", "kinds.png"]
    assert f"wrote {folder / 'eval.json'}" in said
    content = json.loads((folder / "eval.json").read_text())
    assert content["format"] == "flexidepth-eval-1"
    assert len(content["rows"]) == len(result.rows)
    assert len(content["models"]) == 2 and len(content["data"]) == 5
    assert all(
        len(digest) == 64 for digest in [*content["models"].values(), *content["data"].values()]
    )
    assert content["machine"]["cpu"] and content["calibrated_on"].startswith("the text behind")
    text = (folder / "eval.md").read_text()
    assert text == report_text(result) + "\n"
    for title in ("prose, 198 predictions", "letters, 6 questions", "greedy answers to 2 prompts"):
        assert f"### {title}" in text
    for name in ("eval.png", "kinds.png"):
        assert matplotlib.image.imread(folder / name).ndim == 3


def test_tables_are_rectangles_of_the_rows(
    everything: tuple[EvalResult, Path, list[str]],
) -> None:
    from flexidepth.evaluation.report import tables

    result, _, _ = everything
    made = {table.title: table for table in tables(result)}
    assert all(len(row) == len(t.headings) for t in made.values() for row in t.rows)
    overview = made["prose: perplexity, times the base model's, by mean layers to skip"]
    assert overview.headings == ["method", "0", "1", "2"]
    assert [row[0] for row in overview.rows] == ["base", *METHODS, "wide"]
    assert overview.rows[0][1:] == ["1.000", "-", "-"]
    row = next(
        r for r in result.rows if isinstance(r, TextRow) and r.key[1:] == ("random", 2, "prose")
    )
    own = next(cells for cells in overview.rows if cells[0] == "random")
    assert own[3] == f"{row.ratio:.3f}"


def test_prompts_come_from_every_set_of_conversations_in_turn(
    make: Make, chat: Path, llm: FlexiDepth, tmp_path: Path
) -> None:
    other = write_lines(
        tmp_path / "other.jsonl",
        [{"question": sentence(i, 3), "answer": sentence(i, 4)} for i in range(40, 50)],
    )
    options = make(texts={"chat": chat, "other": other}, answers=5)
    data = read_data(options, llm.tokenizer, lambda _: None)
    one, two = (text_set.prompts for text_set in data.sets)
    assert data.prompts == [one[0], two[0], one[1], two[1], one[2]]


def test_only_what_is_given_is_measured(make: Make, prose: Path) -> None:
    result = evaluate(make(texts={"prose": prose}, methods=["shortgpt"], skipped=[1]))
    assert [row.key for row in result.rows] == [
        ("text", "base", 0, "prose"),
        ("text", "shortgpt", 1, "prose"),
    ]


def test_numbers_between_whole_ones_are_for_routers_alone(make: Make, prose: Path) -> None:
    result = evaluate(
        make(texts={"prose": prose}, skipped=[0.5, 1], methods=["flexidepth", "random"])
    )
    points = [(row.method, row.asked) for row in result.rows]
    assert points == [("base", 0), ("flexidepth", 0.5), ("flexidepth", 1), ("random", 1)]


def test_straight_through_gates_begin_at_the_base_model(
    make: Make, prose: Path, tmp_path: Path
) -> None:
    plain = save_tiny(tmp_path / "plain", gate="straight_through")
    result = evaluate(
        make(model=str(plain), texts={"prose": prose}, methods=["flexidepth"], skipped=[0, 1])
    )
    ratios = {(row.method, row.asked): row.ratio for row in result.rows if isinstance(row, TextRow)}
    assert ratios["flexidepth", 0] == 1 != ratios["flexidepth", 1]


@pytest.mark.parametrize(
    ("name", "program"),
    [
        (None, "flexidepth "),  # the installed command
        ("flexidepth.__main__", "flexidepth "),
        ("flexidepth.bench.ablations", "python -m flexidepth.bench.ablations "),
    ],
)
def test_the_command_that_made_it(
    make: Make, prose: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, program: str
) -> None:
    main = ModuleType("__main__")
    main.__spec__ = None if name is None else ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    result = evaluate(make(texts={"prose": prose}, methods=["random"], skipped=[1]))
    assert result.header["command"].startswith(program)


def test_two_runs_are_equal(make: Make) -> None:
    def figures() -> list[dict[str, Any]]:
        rows = [row.to_dict() for row in evaluate(make()).rows]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert repr(figures()) == repr(figures())  # NaN equals itself in text


def test_a_checkpoint_of_another_base_is_refused(make: Make, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", seed=5)
    with pytest.raises(ValueOutOfRangeError, match="'x' is of another base model"):
        evaluate(make(also={"x": str(other)}, methods=[]))


def test_a_further_checkpoint_with_fewer_routed_layers_gives_the_points_it_can(
    make: Make, prose: Path, tmp_path: Path
) -> None:
    narrow = save_tiny(tmp_path / "narrow", routing_layers=[3])
    result = evaluate(make(texts={"prose": prose}, also={"narrow": str(narrow)}, methods=[]))
    assert [(r.method, r.asked) for r in result.rows] == [("base", 0), ("narrow", 0), ("narrow", 1)]


def test_the_dial_is_the_stored_calibration(
    everything: tuple[EvalResult, Path, list[str]], llm: FlexiDepth, prose: Path
) -> None:
    """The same thresholds for whatever is measured, those that target_layers_skipped takes."""
    from flexidepth.evaluation.texts import read_text_set

    result, _, _ = everything
    found = read_text_set("x", prose, llm.tokenizer, tokens=200, window=100).windows
    windows = [window.ids for window in found]
    rows = {r.asked: r for r in result.rows if r.method == "dial" and r.key[3] == "prose"}
    for number in (1, 2):
        scores = llm.score(windows, target_layers_skipped=number)
        used = sum(score.mean_layers_used for score in scores) / 2
        assert rows[number].skipped == pytest.approx(4 - used)
    points = {p["asked"]: p["thresholds"] for p in result.points if p["method"] == "dial"}
    assert points[1] == CALIBRATION[1]["thresholds"]
    assert CALIBRATION[1]["thresholds"] < points[2] < CALIBRATION[2]["thresholds"]
