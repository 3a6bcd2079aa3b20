"""flexidepth bench: options, rows as they come, tables, what goes wrong; never a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flexidepth.bench.models import model_config
from flexidepth.bench.options import BenchOptions, resolve_skips
from flexidepth.bench.results_file import Partial
from flexidepth.errors import OutOfMemoryError, ValueOutOfRangeError
from tests.bench.rows import decode_row
from tests.cli.conftest import Command


def test_skips() -> None:
    assert resolve_skips("all", 3) == [0, 1, 2, 3]
    assert resolve_skips("quarters", 15) == [0, 4, 8, 11, 15]
    assert resolve_skips("quarters", 0) == [0]
    assert resolve_skips([2, 0], 3) == [2, 0]
    with pytest.raises(ValueError, match=r"cannot skip \[4\] layers; this model routes 3"):
        resolve_skips([1, 4], 3)


def test_options_are_checked_for_callers_from_python_too() -> None:
    usual: dict[str, Any] = {
        "models": ["m"],
        "prompts": [8],
        "steps": 8,
        "depths": [4],
        "rounds": 2,
    }
    assert BenchOptions(**usual, skips="all").check_fits(model_config("smollm2-135m")) == list(
        range(16)
    )
    for name, value in {
        "steps": -1, "skips": "some", "shares": [1.5], "threads": [], "models": [], "devices": ["tpu"],
        "batches": [0], "routing": "nowhere.json", "dtypes": ["int3"],
    }.items():  # fmt: skip
        with pytest.raises(ValueOutOfRangeError, match="wanted"):
            BenchOptions(**{**usual, name: value})


def test_lists_make_a_matrix() -> None:
    options = BenchOptions(
        models=["a", "b"], devices=["cpu", "cuda"], dtypes=["auto", "bf16", "f32"], threads=[1, 2]
    )
    found = [(s.model, s.device, s.dtype_name, s.threads) for s in options.settings(8)]
    kinds = [("cpu", t, n) for t in ("bfloat16", "float32") for n in (1, 2)]
    kinds += [("cuda", t, None) for t in ("bfloat16", "float32")]
    assert found == [(m, d, t, n) for m in "ab" for d, t, n in kinds]
    default = BenchOptions(models=["a"])
    assert [s.threads for s in default.settings(8)] == [8]


@pytest.fixture
def small_bench(run: Command, model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command with the parts left out that cost seconds and depend on the machine."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("flexidepth.bench.run.read_bandwidth", lambda threads: 10.0 * threads)
    monkeypatch.setattr("flexidepth.bench.memory.measure_memory", lambda *_: None)

    def call(*arguments: object) -> Any:
        usual = ("-p", 8, "-n", 4, "-d", 4, "--rounds", 2, "-t", 1)
        return run("bench", model, *usual, *arguments)

    return call


def test_bench_json(small_bench: Any, model: str, tmp_path: Path) -> None:
    result = small_bench("-o", "json", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["format"] == "flexidepth-bench-3"
    assert content["models"] == {model: {"num_layers": 4, "routed_layers": 2}}
    found = [(row["test"], row["name"], row["skip_got"]) for row in content["rows"]]
    assert found == [
        (test, name, got)
        for test in ("tg4 @ d4", "pp8")
        for name, got in (("dense", None), ("skip 0", 0), ("skip 1", 1), ("skip 2", 2))
    ]
    assert content["machine"]["cpu"]
    assert content["command"].startswith("flexidepth ")
    assert 0 <= content["harness_share"] < 1
    (few, most) = content["reads"]
    assert few["nbytes"] < most["nbytes"] and sum(few["blocks"]) == len(few["samples"]) == 4
    assert (most["test"], most["threads"], most["batch"]) == ("tg4 @ d4", 1, 1)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == content["rows"]
    lines = (tmp_path / "bench.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == content["rows"]
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 1 + len(content["rows"])
    for name in ("decode.svg", "prompt.svg"):
        assert (tmp_path / name).read_text().lstrip().startswith("<?xml")
    assert not (tmp_path / "breakdown.svg").exists()
    assert not (tmp_path / "bench.partial.jsonl").exists()
    text = (tmp_path / "bench.md").read_text()
    assert text.count("| dense ") == 2
    machine = content["machine"]
    for named in (
        f"On {machine['cpu']}, {machine['cores']} cores ({content['isa']}), {machine['memory_gb']} GB",
        f"Load before and after: {content['load_before']:.2f}, {content['load_after']:.2f}.",
        f"Command: `{content['command']}`; commit {machine['commit']};",
    ):
        assert named in text


def test_rows_are_printed_as_they_come(small_bench: Any) -> None:
    result = small_bench("-o", "jsonl", "-p", 0)
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["name"] for line in result.stdout.splitlines()] == [
        *("dense", "skip 0", "skip 1", "skip 2")
    ]


def test_what_was_measured_before_an_interruption_is_kept(
    small_bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flexidepth.bench.run.measure_prompt", stop)
        assert small_bench("--output-dir", tmp_path).exit_code == 130
    partial = tmp_path / "bench.partial.jsonl"
    kept = partial.read_text()
    assert [json.loads(line)["test"] for line in kept.splitlines()] == ["tg4 @ d4"] * 4
    assert not (tmp_path / "bench.json").exists()
    assert small_bench("--output-dir", tmp_path).exit_code == 0
    assert partial.read_text().startswith(kept)  # it may be of other options


def test_what_was_measured_before_an_error_is_printed(
    small_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("flexidepth.bench.run.measure_prompt", fail)
    result = small_bench()
    assert result.exit_code == 1 and "RuntimeError" in result.stderr
    assert "| skip 2" in result.stdout and "tg4 @ d4" in result.stdout


@pytest.mark.parametrize(
    ("error", "said"), [(OutOfMemoryError("8 GB are missing"), "8 GB"), (MemoryError(), "Memory")]
)
def test_a_test_that_cannot_be_run_is_a_row_and_the_next_one_runs(
    small_bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    from flexidepth.bench import run

    measure = run.measure_decode

    def refuse(*arguments: Any, batch: int, **options: Any) -> Any:
        if batch == 3:
            raise error
        return measure(*arguments, batch=batch, **options)

    monkeypatch.setattr(run, "measure_decode", refuse)
    result = small_bench("-o", "jsonl", "-b", "3,1")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["batch"], r["name"]) for r in rows[:2]] == [(3, "dense"), (1, "dense")]
    assert (
        said in rows[0]["said"] and rows[0]["ms_median"] is None and rows[0]["test"] == "tg4 @ d4"
    )
    assert len(rows) == 1 + 4 + 4


def test_a_breakdown_s_positions_are_checked_before_anything_runs(small_bench: Any) -> None:
    result = small_bench("-d", 205, "--breakdown")
    assert result.exit_code == 1, result.output
    assert "depth 205 and 4 steps need 261 positions; this model has 256" in result.stderr


def test_rows_are_on_disk_as_soon_as_they_are_kept(tmp_path: Path) -> None:
    partial = Partial(tmp_path)
    partial.keep([decode_row("dense", 10.0)])
    assert json.loads((tmp_path / "bench.partial.jsonl").read_text())["name"] == "dense"
    partial.close()
    partial.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_what_cannot_run_is_a_row_that_says_why(small_bench: Any) -> None:
    result = small_bench("--device", "cpu,cuda", "-p", 0, "--skip", 1, "-o", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["device"], row["name"]) for row in rows] == [
        ("cpu", "dense"), ("cpu", "skip 1"), ("cuda", "dense"),
    ]  # fmt: skip
    assert rows[0]["said"] == "" and rows[2]["ms_median"] is None
    assert rows[2]["said"].startswith("cuda")  # no driver, no device, not in this build


def test_a_model_that_does_not_fit_is_a_row_with_its_size(
    small_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexidepth.loading.available_memory_bytes", lambda: 1000)
    result = small_bench("-o", "json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["rows"]
    assert "GB of memory are available" in row["said"]


def test_the_model_s_own_routing_and_a_recorded_one(
    small_bench: Any, run: Command, model: str, tmp_path: Path
) -> None:
    result = small_bench("--routing", "model")
    assert result.exit_code == 1 and "needs a calibrated model" in result.stderr
    report = tmp_path / "report.json"
    run("generate", model, "the", "--max-new-tokens", 5, "--routing-out", report)
    result = small_bench("--routing", report, "-o", "json")
    assert result.exit_code == 0, result.output
    ran = torch.tensor(json.loads(report.read_text())["ran"])
    for row in json.loads(result.stdout)["rows"]:
        if row["name"] != "dense":
            assert row["name"].startswith("recorded (")
            assert row["skip_asked"] == pytest.approx(2 - ran.float().sum(1).mean())
    result = small_bench("--routing", "fixed", "--skip", 1, "-o", "json", "-p", 0)
    assert json.loads(result.stdout)["rows"][1]["name"] == "skip 1 (fixed layers)"


def test_answers_are_in_the_same_table(small_bench: Any) -> None:
    rows = json.loads(small_bench("--accuracy", "-o", "json", "--dtype", "f32").stdout)["rows"]
    for row in rows:
        assert row["logits_rmse"] < 1e-4
        assert row["gate_agreement"] == (None if row["name"] == "dense" else 1.0)


def test_what_the_system_does_not_say_is_null_and_not_a_broken_file(
    small_bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flexidepth.bench.run.load_average", lambda: float("nan"))
    result = small_bench("-o", "json", "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for text in (result.stdout, (tmp_path / "bench.json").read_text()):
        assert json.loads(text, parse_constant=refuse)["load_before"] is None
    text = (tmp_path / "bench.md").read_text()
    assert "Load before and after: not known, not known." in text


def test_a_folder_that_cannot_be_written_is_said_before_measuring(
    small_bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flexidepth.bench.run.run_bench", None)
    (tmp_path / "file").touch()
    result = small_bench("--output-dir", tmp_path / "file" / "results")
    assert result.exit_code == 1
    assert f"{tmp_path / 'file'} is a file; wanted a directory" in result.stderr


def test_bench_tables(small_bench: Any) -> None:
    text = small_bench("--skip", "all", "--shares", "50").stdout
    assert "| tg4 @ d4 |" in text
    assert "| pp8 |" in text
    assert "Bandwidth: 10.0 GB/s with 1 threads" in text
    assert json.loads(small_bench("--json").stdout)["format"] == "flexidepth-bench-3"
    rows = small_bench("-o", "csv", "-p", 0).stdout.splitlines()
    assert rows[0].startswith("model,device,")
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--skip", "3"), 1, "cannot skip [3] layers; this model routes 2"),
        (("--skip", "some"), 2, "wanted numbers"),
        (("-o", "xml"), 2, "wanted md, csv, json or jsonl"),
        (("--skip", "99"), 1, "cannot skip [99] layers; this model routes 2; wanted 0 to 2"),
        (("--skip", "0,-1"), 2, "skip is [0, -1]; wanted numbers from 0 on"),
        (("-p", "0", "-n", "0"), 2, "nothing to measure"),
        (("-p", "-1"), 2, "prompt is [-1]; wanted 0 or more"),
        (("-n", "1"), 2, "steps is 1; wanted 0, or 2 or more: one in each of 2 rounds"),
        (("-p", "257"), 1, "prompt is 257; wanted 0 to 256, the model's positions"),
        (("-n", "250"), 1, "depth 4 and 250 steps need 262 positions; this model has 256"),
        (("-d", "0", "--peers"), 2, "depth is 0; wanted 1 or more"),
        (("--shares", "500,-50"), 2, "shares is [500.0, -50.0]; wanted per cents from 0 to 100"),
        (("--shares", "x"), 2, "--shares 'x': wanted numbers"),
        (("-t", "0"), 2, "threads is [0]; wanted numbers from 1 to 1024"),
        (("-t", "1,2000"), 2, "threads is [1, 2000]; wanted numbers from 1 to 1024"),
        (("-t", ""), 2, "--threads '': wanted numbers"),
        (("--dtype", "int3"), 2, "dtype is 'int3'; wanted one of auto, bfloat16"),
        (("--device", "tpu"), 2, "device is ['tpu']; wanted cpu, cuda or cuda:1"),
        (("-b", "0"), 2, "batch is [0]; wanted numbers from 1 to 64"),
        (
            ("--routing", "x.json"),
            2,
            "routing is 'x.json'; wanted random, fixed, model or a routing",
        ),
        (("--peer", "nobody"), 2, "peers is ['nobody']; wanted some of"),
        (("--rounds", "0"), 2, "rounds is 0; wanted 1 or more"),
    ],
)
def test_bench_bad_values(
    small_bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr("flexidepth_ext.engine.Engine.__init__", None)  # nothing gets that far
    result = small_bench(*options)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())


def test_demo_on_a_tiny_model(model: str, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("flexidepth.cli.demo._ROUNDS", 1)
    result = run("demo", model, "--max-new-tokens", 8, "-t", 1, "--color", "always")
    assert result.exit_code == 0, result.output
    for piece in (
        f"{model}, kept in {model}",
        "4 layers, 2 of them routed",
        "seeded, not trained",
        "the base model's own answer",
        "20% of the routed layers skipped",
        "4.0 of 4 layers a token]",
        "2 of 2 routed (100%)",
        "\x1b[38;2;",
    ):
        assert piece in result.stdout
    ratios = [line for line in result.stdout.splitlines() if " of 2 routed (" in line]
    assert len(ratios) == 5
