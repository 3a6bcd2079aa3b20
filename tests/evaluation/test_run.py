"""A whole evaluation: every row, what is shared, what survives an interruption, what is written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import pytest

from flexidepth import FlexiDepth
from flexidepth.errors import SaveError, UnsupportedError, ValueOutOfRangeError
from flexidepth.evaluation import EvalOptions, EvalResult, evaluate, measure
from flexidepth.evaluation.data import read_data
from flexidepth.evaluation.points import METHODS
from flexidepth.evaluation.record import PARTIAL
from flexidepth.evaluation.report import report_text
from flexidepth.evaluation.rows import AnswersRow, KindRow, TaskRow, TextRow

from .conftest import CALIBRATION, save_tiny, sentence, write_lines

Make = Callable[..., EvalOptions]


@pytest.fixture
def make(model: Path, prose: Path, chat: Path) -> Make:
    """Options for a small run; arguments change them."""

    def options(**changes: Any) -> EvalOptions:
        values: dict[str, Any] = {
            "model": str(model),
            "texts": {"prose": prose, "chat": chat},
            "skipped": [0, 1, 2],
            "tokens": 200,
            "window": 100,
            "calibration_tokens": 200,
            "limit": 6,
            "answers": 2,
            "max_new_tokens": 8,
            "per_kind": 0,
            "dtype": "float32",
            "num_threads": 1,
        }
        return EvalOptions(**{**values, **changes})

    return options


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


def test_an_interrupted_run_goes_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(make())
    trace, calls = measure.trace_windows, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return trace(*arguments)

    monkeypatch.setattr(measure, "trace_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(make(), output_dir=tmp_path)
    kept = json.loads((tmp_path / PARTIAL).read_text())["rows"]
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL] and 3 < len(kept) < 20
    monkeypatch.setattr(measure, "trace_windows", trace)
    said: list[str] = []
    result = evaluate(make(num_threads=2), output_dir=tmp_path, notify=said.append)
    assert said[0] == f"{len(kept)} rows of an interrupted run are kept"
    assert not (tmp_path / PARTIAL).exists()

    def figures(result: EvalResult) -> dict[Any, Any]:
        return {r.key: repr({**r.to_dict(), "seconds": 0}) for r in result.rows}

    assert figures(result) == figures(whole)
    assert result.rows[0].seconds == kept[0]["seconds"]  # not measured again
    assert len(result.points) == len(whole.points)


def test_an_interrupted_run_compares_with_the_same_base_model(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted once only the ablated model is left, which is computed by another program than the others."""
    ablated = save_tiny(tmp_path / "ablated", ablations=["no_adapter"], gate="straight_through")
    options = make(also={"ablated": str(ablated)}, methods=["random"], skipped=[1, 2])
    whole = evaluate(options)
    add = measure.Record.add

    def interrupted(record: Any, row: Any) -> None:
        add(record, row)
        if row.method == "ablated":
            raise KeyboardInterrupt

    monkeypatch.setattr(measure.Record, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, output_dir=tmp_path / "out")
    monkeypatch.setattr(measure.Record, "add", add)
    told: list[Any] = []
    trace, answer = measure.trace_windows, measure.answer_prompts

    def traced(engine: Any, *rest: Any) -> Any:
        told.append((type(engine).__name__, rest[-1].method))
        return trace(engine, *rest)

    def answered(llm: Any, *rest: Any) -> Any:
        told.append((type(llm.engine).__name__, rest[1].method))
        return answer(llm, *rest)

    monkeypatch.setattr(measure, "trace_windows", traced)
    monkeypatch.setattr(measure, "answer_prompts", answered)
    result = evaluate(options, output_dir=tmp_path / "out")
    computed = [engine for engine, method in told if method == "base"]
    assert computed == ["Engine"] * 3  # two texts and the answers
    figures, others = (
        {r.key: repr({**r.to_dict(), "seconds": 0}) for r in made.rows} for made in (result, whole)
    )
    assert figures == others


@pytest.mark.parametrize("change", [{"tokens": 150}, {"dtype": "bfloat16"}, {"seed": 1}])
def test_rows_of_other_options_are_not_taken_but_kept(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    options = make(methods=["random"], answers=0)
    monkeypatch.setattr("flexidepth.evaluation.record.Record.discard", lambda _: None)
    evaluate(options, output_dir=tmp_path)
    before = (tmp_path / PARTIAL).read_bytes()
    number = len(json.loads(before)["rows"])
    said: list[str] = []
    evaluate(make(methods=["random"], answers=0, **change), output_dir=tmp_path, notify=said.append)
    (name,) = change
    aside = tmp_path / "eval.partial.1.json"
    other = f"is of a run with other {name}; its {number} rows are kept as {aside}"
    assert said[0] == f"{tmp_path / PARTIAL} {other}"
    assert aside.read_bytes() == before
    evaluate(options, output_dir=tmp_path)
    assert (tmp_path / "eval.partial.2.json").exists() and aside.read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", '{"identity": 1}', "null", '{"identity": {}}'])
def test_a_damaged_record_is_measured_anew(make: Make, tmp_path: Path, content: str) -> None:
    (tmp_path / PARTIAL).write_text(content)
    said: list[str] = []
    options = make(methods=["random"], skipped=[1], answers=0)
    result = evaluate(options, output_dir=tmp_path, notify=said.append)
    assert len(result.rows) == 4
    assert "is no record of a run" in said[0] and "eval.partial.1.json" in said[0]
    assert (tmp_path / "eval.partial.1.json").read_text() == content


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


def test_short_files_are_calibrated_on_themselves(make: Make, tmp_path: Path) -> None:
    short = write_lines(tmp_path / "short.jsonl", [{"text": sentence(1, 30)}])
    result = evaluate(make(texts={"short": short}, methods=["flexidepth"], skipped=[1]))
    assert result.header["calibrated_on"].startswith("the measured text itself")
    row = result.rows[-1]
    assert row.skipped == pytest.approx(1, abs=0.02)


def test_too_few_answers_behind_the_measured_part_calibrate_nothing(
    make: Make, tmp_path: Path
) -> None:
    """Tokens enough, of which nearly all are questions."""
    talks = [{"question": sentence(i, 9), "answer": "no"} for i in range(20)]
    asked = write_lines(tmp_path / "asked.jsonl", talks)
    result = evaluate(make(texts={"asked": asked}, methods=["random"], skipped=[1]))
    (each,) = result.header["calibrated_each"]
    assert each["source"].startswith("the measured text itself") and each["tokens"] < 50


def test_each_subject_skips_as_many_layers_as_were_asked_of_it(
    make: Make, tmp_path: Path, tasks: Path
) -> None:
    """Two texts of which one threshold skips unlike numbers; a task, whose questions are its calibration."""
    low = write_lines(tmp_path / "low.jsonl", [{"text": "abcde" * 20} for _ in range(9)])
    high = write_lines(tmp_path / "high.jsonl", [{"text": "VWXYZ" * 20} for _ in range(9)])
    texts = {"low": low, "high": high}
    options = make(texts=texts, tasks=tasks / "words.jsonl", limit=12, calibration_tokens=2000)
    result = evaluate(options)
    own = [r for r in result.rows if r.method == "flexidepth" and r.part != "answers" and r.asked]
    assert len(own) == 6
    for row in own:
        assert row.skipped == pytest.approx(row.asked, abs=0.05)
    point = next(p for p in result.points if (p["method"], p["asked"]) == ("flexidepth", 1))
    offsets = {each["subject"]: each["offset"] for each in point["each"]}
    assert abs(offsets["low"] - offsets["high"]) > 0.05


def test_points_do_not_depend_on_each_other(make: Make, prose: Path) -> None:
    def row(skipped: list[float]) -> str:
        options = make(texts={"prose": prose}, methods=["flexidepth"], skipped=skipped)
        rows = {r.key: r for r in evaluate(options).rows}
        return repr({**rows["text", "flexidepth", 1.5, "prose"].to_dict(), "seconds": 0})

    assert row([1.5]) == row([0.5, 1, 1.5, 2.5])


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


def test_a_dial_that_is_not_there_or_ends_before_is_said_and_left_out(
    make: Make, prose: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options = make(texts={"prose": prose}, methods=["dial"], skipped=[2.5, 3])
    result = evaluate(options, notify=said.append)
    assert [(r.method, r.asked) for r in result.rows] == [("base", 0), ("dial", 2.5)]
    assert any("dial: target_layers_skipped: 3" in line and "left out" in line for line in said)
    bare = save_tiny(tmp_path / "bare")
    result = evaluate(
        make(model=str(bare), texts={"prose": prose}, methods=["dial"]), notify=said.append
    )
    assert {r.method for r in result.rows} == {"base"}
    assert any("dial: the model has no calibration; left out" in line for line in said)


def test_tasks_alone_take_their_calibration_from_a_file(
    make: Make, tasks: Path, prose: Path
) -> None:
    result = evaluate(make(texts={}, tasks=tasks / "words.jsonl", calibration=prose, skipped=[1]))
    assert {row.part for row in result.rows} == {"task"}
    assert result.header["calibrated_on"] == str(prose)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skipped": [4]}, r"cannot skip \[4\] layers; this model routes 3"),
        ({"window": 2000}, "window is 2000 tokens; this model has 1024 positions"),
    ],
)
def test_what_does_not_fit_the_model(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=message):
        evaluate(make(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skipped": []}, "wanted numbers of layers"),
        ({"skipped": [-1]}, "wanted numbers of layers"),
        ({"skipped": ["1"]}, "wanted numbers of layers"),
        ({"skipped": [1, 1.0]}, "wanted each number once"),
        ({"methods": ["laco"]}, r"methods \['laco'\]; wanted some of flexidepth, dial, static"),
        ({"also": {"random": "x"}}, "named 'random'; that name is taken"),
        ({"texts": {}}, "neither texts nor tasks"),
        ({"texts": {}, "tasks": Path("x")}, "no text to find thresholds on"),
        ({"tokens": 1}, "tokens is 1; wanted a whole number, 2 or more"),
        ({"limit": 0}, "limit is 0"),
        ({"answers": -1}, "answers is -1"),
    ],
)
def test_options_are_checked(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=message):
        make(**change)


def test_a_model_without_a_tokenizer_is_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexidepth.checkpoints.source.directory_tokenizer", lambda _: None)
    with pytest.raises(UnsupportedError, match="without a tokenizer"):
        evaluate(make())


def test_a_folder_that_cannot_be_written_is_refused_first(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="file is a file"):
        evaluate(make(model="no such model"), output_dir=tmp_path / "file")


def test_a_number_that_no_threshold_meets_is_said_and_left_out(
    make: Make, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexidepth.training import calibration

    find = calibration._Search.find

    def unmet(search: Any, target: float) -> Any:
        if target == 1:
            raise ValueOutOfRangeError("calibrate: 1 layers skipped cannot be met")
        return find(search, target)

    monkeypatch.setattr(calibration._Search, "find", unmet)
    said: list[str] = []
    options = make(texts={"prose": prose}, methods=["flexidepth"])
    result = evaluate(options, notify=said.append)
    assert [row.asked for row in result.rows if row.method == "flexidepth"] == [0, 2]
    assert (
        "flexidepth, prose: calibrate: 1 layers skipped cannot be met; that row is left out" in said
    )
