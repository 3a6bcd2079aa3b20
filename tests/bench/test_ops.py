"""Each op alone: what it computes on, what it reads. Never how long it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flexidepth.bench.breakdown import PARTS, measure_breakdown
from flexidepth.bench.ideal import bytes_per_token
from flexidepth.bench.models import NAMES, model_config, open_model, random_weights
from flexidepth.bench.ops import measure_ops, op_cases
from flexidepth.bench.plans import make_plans
from flexidepth.errors import ValueOutOfRangeError
from flexidepth_ext import ops
from flexidepth_ext.engine import Engine
from tests.cli.conftest import Command

TINY = model_config("tiny")


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_op_runs_and_reads_what_it_says(rows: int) -> None:
    cases = {c.name: c for c in op_cases(TINY, torch.bfloat16, rows, 5, ops.context(1))}
    assert list(cases) == [
        *("router gate", "compaction", "KV-only pass", "queries", "attention"),
        *("output", "feed-forward", "adapter", "LM head"),
    ]
    for case in cases.values():
        run = case.make()
        for _ in range(3):  # again and again: caches go back to where they were
            run()
    d, f = TINY.hidden_size, TINY.intermediate_size
    assert cases["feed-forward"].nbytes == 2 * 3 * d * f
    assert cases["feed-forward"].flops == rows * 6 * d * f
    assert cases["LM head"].nbytes == 2 * d * TINY.vocab_size
    assert cases["attention"].what == f"{max(1, rows // 2)} queries, {5 + rows} keys"


def test_the_ops_of_a_layer_read_what_a_token_reads() -> None:
    cases = {c.name: c.nbytes for c in op_cases(TINY, torch.bfloat16, 1, 0, ops.context(1))}
    always = cases["KV-only pass"] + cases["router gate"]
    run = always + sum(cases[n] for n in ("queries", "output", "feed-forward"))
    skipped = always + cases["adapter"]
    saved = bytes_per_token(TINY, 0) - bytes_per_token(TINY, 1)
    assert run - skipped == saved


def test_rows_of_a_measurement() -> None:
    said: list[str] = []
    rows = measure_ops(
        TINY, torch.float32, [1, 2], depth=4, threads=1, bandwidth=10.0, repeats=3, notify=said.append
    )  # fmt: skip
    assert len(rows) == len(said) == 18
    for row in rows:
        assert len(row.samples) == 3
        assert row.gb_per_s == pytest.approx(row.megabytes / row.us_median * 1e3)
        assert row.bandwidth_share == pytest.approx(row.gb_per_s / 10)


def test_the_command(run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("flexidepth.bench.bandwidth.read_bandwidth", lambda threads: 10.0)
    arguments = ("bench", "ops", "--shape", "tiny", "--rows", "1", "-t", 1, "--repeats", 3)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "| LM head | 64 -> 256 | 1 |" in result.stdout
    assert "64 tokens" not in result.stdout and "128 tokens in the cache" in result.stdout
    content = json.loads(run(*arguments, "--json", "--output-dir", tmp_path).stdout)
    assert json.loads((tmp_path / "ops.json").read_text())["ops"] == content["ops"]
    assert "| LM head | 64 -> 256 | 1 |" in (tmp_path / "ops.md").read_text()
    assert [row["name"] for row in content["ops"]][-1] == "LM head"
    for wrong, message in (
        (("--shape", "huge"), "wanted one of tiny"),
        (("--rows", "0"), "wanted numbers from 1 on"),
        (("--dtype", "f16"), "wanted one of auto"),
    ):
        result = run(*arguments, *wrong)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tiny"])
def test_shapes_are_those_of_the_models(name: str) -> None:
    """Parameters of the base models as their authors count them, in millions."""
    from math import prod

    from flexidepth.checkpoints.checkpoint import expected_shapes

    millions = {
        "smollm2-135m": 134.5,
        "qwen2.5-0.5b": 494.0,
        "llama-3.2-1b": 1235.8,
        "llama-3-8b": 8030.3,
    }
    shapes = expected_shapes(model_config(name), routing=False).values()
    assert sum(map(prod, shapes)) / 1e6 == pytest.approx(millions[name], abs=0.06)


def test_random_models_open_like_others() -> None:
    checkpoint = open_model("random:tiny")
    first, second = (dict(checkpoint.tensors()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert checkpoint.tokenizer() is None
    with pytest.raises(ValueOutOfRangeError, match="no shape 'huge'; wanted one of tiny"):
        open_model("random:huge")


def test_parts_of_a_layer_add_up_to_the_pass() -> None:
    engine = Engine(
        TINY, random_weights(TINY, torch.float32, "cpu"), dtype=torch.float32, num_threads=1
    )
    run, skipped = make_plans("fixed", [0, 2], TINY)
    found = measure_breakdown(engine, run, skipped, depth=4, rate=2.0, steps=3)
    others = "plain, others skipped"
    assert [layer.layer for layer in found.layers] == ["plain", "run", others, "skipped"]
    assert (found.dtype, found.threads, [layer.count for layer in found.layers]) == (
        "float32",
        1,
        [2, 2, 2, 2],
    )
    assert min(*found.head_ms, *found.other_ms) > 0
    zero = {
        layer.layer: {part for part in PARTS if layer.parts[part] == 0} for layer in found.layers
    }
    assert zero == {
        "plain": {"router", "adapter"},
        others: {"router", "adapter"},
        "run": {"adapter"},
        "skipped": {"queries and output", "attention", "feed-forward"},
    }
    read = {layer.layer: layer.by_bytes * 2.0 * 1e6 for layer in found.layers}
    size = {"weight_bytes": 4, "context": 4}
    head = 4 * TINY.vocab_size * TINY.hidden_size
    for n in range(3):
        token = 2 * read["plain"] + (2 - n) * read["run"] + n * read["skipped"] + head
        assert token == pytest.approx(bytes_per_token(TINY, n, **size))
    assert all(value >= 0 for layer in found.layers for value in layer.parts.values())
    engine.record_times()
    cache = engine.new_cache(8)
    engine.forward(torch.tensor([5], dtype=torch.int32), [1], [cache], routing="dense")
    times = engine.times()
    assert sum(times.values()) > 0
    assert all(v == 0 for name, v in times.items() if name.startswith("routed."))
    engine.record_times(False)
    engine.forward(torch.tensor([5], dtype=torch.int32), [1], [cache], routing="dense")
    assert not any(engine.times().values())


def test_plans_skip_what_they_say(tmp_path: Path) -> None:
    for skipped in range(3):
        for routing in ("random", "fixed"):
            (plan,) = make_plans(routing, [skipped], TINY)
            assert plan.mask is not None
            assert (plan.mask(3, 10, 7) == 0).sum(1).tolist() == [skipped] * 7
    (fixed,) = make_plans("fixed", [1], model_config("smollm2-135m"))
    assert fixed.mask is not None and len(fixed.mask(0, 0, 9).unique(dim=0)) == 1
    (tmp_path / "x.json").write_text("{}")
    from flexidepth.errors import CheckpointError

    with pytest.raises(CheckpointError, match="is not a routing report"):
        make_plans(str(tmp_path / "x.json"), [], TINY)
