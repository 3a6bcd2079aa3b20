"""The measuring core and flexidepth bench: the limit, exact skips, tables; never a time."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from flexidepth import FlexiDepth, FlexiDepthConfig
from flexidepth.bench.decode import decode_case, measure_decode
from flexidepth.bench.ideal import bytes_per_token, flops_of_prompt, ideal_speedup
from flexidepth.bench.machine import describe_machine
from flexidepth.bench.models import step_bytes
from flexidepth.bench.options import BenchOptions, resolve_skips
from flexidepth.bench.plans import dense_plan, make_plans
from flexidepth.bench.prompt import measure_prompt
from flexidepth.bench.report import DECODE_COLUMNS, csv_text, markdown, table, tables
from flexidepth.bench.results_file import Partial
from flexidepth.bench.timing import Case, alternate
from flexidepth.errors import OutOfMemoryError, ValueOutOfRangeError
from flexidepth_ext import _C
from tests.bench.rows import decode_row
from tests.cli.conftest import Command


def config_of(d: int, f: int, layers: int, heads: int, kv: int, v: int) -> FlexiDepthConfig:
    return FlexiDepthConfig(
        vocab_size=v,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=d // heads,
        routing_layers=list(range(layers // 2, layers)),
    )


SMOLLM2 = config_of(576, 1536, 30, 9, 3, 49152)
LLAMA3 = config_of(4096, 14336, 32, 32, 8, 128256)


@pytest.mark.parametrize(
    ("config", "row"),
    [
        (
            SMOLLM2,
            {0: 0.995, 2: 1.044, 4: 1.098, 6: 1.157, 8: 1.224, 10: 1.298, 12: 1.382, 15: 1.531},
        ),
        (LLAMA3, {0: 0.996, 2: 1.051, 4: 1.113, 8: 1.262, 12: 1.456, 16: 1.722}),
    ],
)
def test_ideal_speedup_of_known_models(config: FlexiDepthConfig, row: dict[int, float]) -> None:
    for skipped, wanted in row.items():
        assert ideal_speedup(config, skipped) == pytest.approx(wanted, abs=6e-4)


def test_bytes_of_known_models() -> None:
    assert bytes_per_token(SMOLLM2, 0, routers=False) == pytest.approx(269.0e6, rel=1e-3)
    assert bytes_per_token(LLAMA3, 0, routers=False) == pytest.approx(15.01e9, rel=1e-3)


def test_bytes_follow_the_weights_of_the_model(model: str) -> None:
    """A dense token reads every base weight but the embedding table, of which it takes one row."""
    with FlexiDepth.from_pretrained(model, dtype="float32", num_threads=1) as llm:
        config = llm.config
    from flexidepth.checkpoints.checkpoint import expected_shapes

    shapes = expected_shapes(config, routing=False)
    read = sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if name not in ("model.embed_tokens.weight", "model.norm.weight")
    )
    assert bytes_per_token(config, 0, weight_bytes=4, routers=False) == 4 * read


def test_a_skipped_layer_reads_no_cache_of_its_own() -> None:
    kv = 3 * 64
    at = {
        n: bytes_per_token(SMOLLM2, n, context=1000) - bytes_per_token(SMOLLM2, n) for n in (0, 5)
    }
    assert at == {0: 4 * kv * 1000 * 30, 5: 4 * kv * 1000 * 25}


def test_prompt_arithmetic_falls_with_the_share_skipped() -> None:
    dense = flops_of_prompt(SMOLLM2, 512, 0.0, routers=False)
    matrices = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    scores = 30 * 576 * 513
    assert dense == 2 * (512 * (matrices + scores) + 49152 * 576)
    shares = [flops_of_prompt(SMOLLM2, 512, share) for share in (0.0, 0.5, 1.0)]
    assert shares[0] > dense > shares[1] > shares[2]
    assert shares[0] - shares[1] == pytest.approx(shares[1] - shares[2])


def test_cases_take_turns_and_the_first_steps_do_not_count() -> None:
    order: list[str] = []
    cases = [
        Case(name, lambda n=name: order.append(n), lambda n=name: order.append(n.upper()))  # type: ignore[misc]
        for name in "ab"
    ]
    said: list[str] = []
    cases[0].after = lambda: order.append("-")
    spent = alternate(cases, rounds=2, steps=3, warmup=1, settle=0, progress=said.append)
    assert "".join(order) == "Aaa-BbbBbbbAaa-a-"  # another one begins each turn
    assert [len(case.samples) for case in cases] == [3, 3]
    assert [case.blocks for case in cases] == [[1, 2], [1, 2]]
    assert spent.timed == pytest.approx(sum(sum(case.samples) for case in cases))
    assert spent.harness_share == spent.between / (spent.between + spent.timed)
    assert said[0] == "round 1/2: a"


def test_a_block_begins_anew_once_caches_are_steady() -> None:
    order: list[str] = []
    case = Case("a", lambda: order.append("a"), lambda: order.append("A"))
    case.after = lambda: order.append("-")
    alternate([case], rounds=2, steps=2, steady=3, warmup=1, settle=0)
    assert "".join(order) == "AaaaAaa-" * 2
    assert case.blocks == [1, 1]


def test_others_code_that_fails_ends_its_case_alone() -> None:
    steps = iter(range(4))

    def fail() -> None:
        if next(steps) == 3:
            raise RuntimeError("out of luck")

    peer, own = Case("peer", fail, foreign=True), Case("own", lambda: None)
    spent = alternate([peer, own], rounds=3, steps=3, warmup=1, settle=0)
    assert peer.failed == "RuntimeError: out of luck" and not peer.samples and not peer.blocks
    assert len(own.samples) == 3 and spent.timed > 0
    with pytest.raises(StopIteration):
        alternate([Case("own", lambda: next(steps))], rounds=1, steps=1, settle=0)


def test_only_those_whose_threads_spin_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    cases = [Case("ours", lambda: None, spins=False), Case("theirs", lambda: None)]
    alternate(cases, rounds=3, steps=3, settle=0.25)
    # Ours, theirs; ours, theirs; theirs, ours: before the first block, and before each that follows one of theirs.
    assert slept == [0.25] * 4


def test_decode_skips_exactly_what_is_asked(model: str) -> None:
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        engine, seen = llm.engine, []
        forward = engine.forward

        def spy(*arguments: Any, **options: Any) -> Any:
            result = forward(*arguments, **options)
            if len(arguments[0]) == 1:
                seen.append((options["routing"], result.ran.sum().item()))
            return result

        engine.forward = spy
        for skipped in (None, 0, 1, 2):
            config = llm.config
            plan = dense_plan() if skipped is None else make_plans("random", [skipped], config)[0]
            case = decode_case(engine, plan, batch=1, depth=4, steps=3)
            case.start()
            for _ in range(3):
                case.step()
    wanted = [("dense", 2)] * 3
    wanted += [("forced_hard", ran) for ran in (2, 1, 0) for _ in range(3)]
    assert seen == wanted


def test_rows_of_a_measurement(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    peer = Case("peer", lambda: None)
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        plans = make_plans("random", [0, 2], llm.config)
        rows = measure_decode(
            llm.engine, plans, peers=[peer], depth=4, rounds=2, steps=6, bandwidth=10.0
        )
        prompt = measure_prompt(llm.engine, 8, make_plans("random", [0, 1], llm.config), rounds=1)
        config = llm.config
    assert [(r.name, r.skip_asked, r.skip_got) for r in rows] == [
        ("dense", None, None),
        ("skip 0", 0, 0),
        ("skip 2", 2, 2),
        ("peer", None, None),
    ]
    dense, _, all_skipped, other = rows
    assert dense.speedup == 1.0
    assert all_skipped.speedup == pytest.approx(dense.ms_median / all_skipped.ms_median)
    assert all_skipped.ideal == pytest.approx(ideal_speedup(config, 2, context=4))
    assert all_skipped.of_ideal == pytest.approx(all_skipped.speedup / all_skipped.ideal)
    assert all_skipped.over_peers == {
        "peer": pytest.approx(other.ms_median / all_skipped.ms_median)
    }
    assert dense.work_share == pytest.approx(dense.work / dense.given) and dense.given != 10
    reads = all_skipped.ideal * all_skipped.given / dense.given
    assert all_skipped.ideal_reads == pytest.approx(reads)
    assert all_skipped.of_reads == pytest.approx(all_skipped.speedup / reads)
    size = bytes_per_token(config, 0, weight_bytes=2, context=4, routers=False)
    assert dense.work == pytest.approx(size / dense.ms_median / 1e6)
    assert (other.work, other.ideal, other.over_peers) == (None, None, {})
    assert all(len(r.samples) == 6 and list(r.blocks) == [3, 3] for r in rows)
    assert [(r.name, r.skip_got) for r in prompt] == [("dense", None), ("skip 0", 0), ("skip 1", 1)]
    assert prompt[2].ideal == pytest.approx(
        flops_of_prompt(config, 8, 0.0, routers=False) / flops_of_prompt(config, 8, 0.5)
    )
    ((title, group, columns),) = tables(rows)
    assert title == ", bfloat16, cpu, tg6 @ d4, 1 thread" and group == rows
    texts = markdown(rows, columns).splitlines()
    assert len(texts) == 6
    assert texts[0].startswith("| tg6 @ d4 | asked | got |") and texts[0].endswith("| x peer |")
    parsed = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert float(parsed[2]["ideal"]) == all_skipped.ideal
    assert float(parsed[2]["over peer"]) == all_skipped.over_peers["peer"]
    assert len({len(line) for line in table(rows, DECODE_COLUMNS).splitlines()}) == 1


def test_sequences_decode_side_by_side_by_masks_of_their_own(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        plans = make_plans("random", [1], llm.config)
        case = decode_case(llm.engine, plans[0], batch=8, depth=4, steps=6)
        case.start()
        for _ in range(6):
            case.step()
            case.after()
        rows = measure_decode(llm.engine, plans, batch=8, depth=4, rounds=1, steps=6)
        config = llm.config
    masks = torch.stack(case.decided)
    assert masks.shape == (6, 8, 2) and (masks.sum(-1) == 1).all()
    assert any(len(step.unique(dim=0)) == 2 for step in masks)  # sequences differ
    one = rows[1]
    assert one.skip_got == 1
    # A layer is read if any sequence runs it: with 8 sequences that is nearly the dense model.
    mean = sum(step_bytes(config, m, 2, 4, 8) for m in masks) / 6
    assert 1 / one.ideal == pytest.approx(mean / step_bytes(config, None, 2, 4, 8), rel=0.2)
    assert one.ideal < ideal_speedup(config, 1, context=4)
    assert one.tps_mean == pytest.approx(8 * sum(1 / s for s in one.samples) / 6)


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
    assert BenchOptions(**usual, skips="all").check_fits(SMOLLM2) == list(range(16))
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


def test_machine_is_named() -> None:
    machine = describe_machine()
    assert machine["cores"] >= 1
    assert 1 <= machine["usable_threads"] <= 1024
    assert machine["versions"]["torch"] == torch.__version__
    json.dumps(machine)


def test_commit_is_that_of_these_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = [
            "git",
            "-C",
            str(tmp_path),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source = tmp_path / "machine.py"
    source.write_text("one")
    monkeypatch.setattr("flexidepth.bench.machine.__file__", str(source))
    built = _C.build_info()["commit"] or "not known"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of somebody else")
    assert describe_machine()["commit"] == built
    git("add", "machine.py")
    git("commit", "-q", "-m", "ours")
    assert describe_machine()["commit"] == git("rev-parse", "--short", "HEAD")
    source.write_text("two")
    assert describe_machine()["commit"] == git("rev-parse", "--short", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert describe_machine()["commit"] == built


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


def test_caches_that_do_not_fit_are_said_with_their_size(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexidepth.bench.decode.available_memory_bytes", lambda: 1000)
    with (
        FlexiDepth.from_pretrained(model, num_threads=1) as llm,
        pytest.raises(OutOfMemoryError, match=r"3 sequences of 42 tokens need 0\.0 GB of keys and"),
    ):
        measure_decode(llm.engine, [], batch=3, depth=4, steps=4)


def test_a_peer_that_fails_meanwhile_is_a_row(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)

    def fail() -> None:
        raise RuntimeError("it broke")

    peers = [
        Case("bad", fail, foreign=True, note="x"),
        Case("good", lambda: None, foreign=True, note="f32"),
    ]
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        dense, bad, good = measure_decode(llm.engine, [], peers=peers, depth=4, steps=4, rounds=2)
    assert (bad.said, bad.ms_median, bad.peer) == ("RuntimeError: it broke", None, True)
    assert good.said == "f32" and good.ms_median and list(dense.over_peers) == ["good"]


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
