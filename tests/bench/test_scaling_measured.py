"""Measured points beside predictions, and files that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexidepth.bench.gpu.engine_report import EngineReport
from flexidepth.bench.gpu.engine_timing import DecodeRow as GpuDecodeRow
from flexidepth.bench.gpu.engine_timing import PromptRow as GpuPromptRow
from flexidepth.bench.ideal import flops_of_prompt, ideal_speedup
from flexidepth.bench.models import model_config
from flexidepth.bench.results_file import read_results
from flexidepth.bench.scaling.costs import Layers, dense_bytes, layers_of_token
from flexidepth.bench.scaling.devices import (
    CPU_LATENCY,
    CPU_PHASES,
    CPU_SHARE,
    CUDA_LATENCY,
    CUDA_PHASES,
)
from flexidepth.bench.scaling.measured import read_measured
from flexidepth.bench.scaling.model import (
    Machine,
    dense_seconds,
    step_seconds,
    token_seconds,
)
from flexidepth.bench.scaling.points import Errors, Point, Series, pooled
from flexidepth.bench.scaling.precision import BF16
from flexidepth.bench.scaling.shapes import shape_config

CONFIG = shape_config("smollm2-135m", 8)
SKIPS = (0, 5, 15)


def decode_rows(seconds: dict[int | None, float], threads: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "name": "dense" if skipped is None else f"skip {skipped}",
            "threads": threads,
            "skipped": skipped,
            "ms_median": 1e3 * time,
            "ideal": None if skipped is None else ideal_speedup(CONFIG, skipped, context=128),
            "samples": [time] * 5,
        }
        for skipped, time in seconds.items()
    ]


def bench(**changes: Any) -> dict[str, Any]:
    """A run on a machine that is as the model says, but reads with 0.8 of the bandwidth."""
    machine = Machine(20.0, 0.8, CPU_PHASES, CPU_LATENCY)
    seconds: dict[int | None, float] = {None: dense_seconds(machine, CONFIG, BF16, context=128)}
    seconds |= {n: token_seconds(machine, CONFIG, BF16, n, context=128) for n in SKIPS}
    dense = flops_of_prompt(CONFIG, 512, 0.0, routers=False)
    half = flops_of_prompt(CONFIG, 512, 8 / 15)
    peer = {**decode_rows(seconds)[0], "name": "llama.cpp bf16"}
    prompt = {"threads": 2, "tokens": 512, "samples": [1.0, 2.0]}
    content: dict[str, Any] = {
        "format": "flexidepth-bench-1",
        "model": "smollm2-135m",
        "dtype": "bfloat16",
        "depth": 128,
        "num_layers": 30,
        "routed_layers": 15,
        "read_bandwidth_gb_per_s": {"2": 20.0},
        "decode": [*decode_rows(seconds), peer],
        "prompt": [
            {**prompt, "name": "dense", "skip_share": None, "s_median": 1.0, "ideal": 1.0},
            {
                **prompt,
                "name": "skip",
                "skip_share": 0.5,
                "s_median": 1.1 * half / dense,
                "ideal": dense / half,
            },
            {
                **prompt,
                "name": "llama.cpp bf16",
                "skip_share": None,
                "s_median": 2.0,
                "ideal": None,
            },
        ],
    }
    return {**content, **changes}


def write(results: Path, folder: str, content: object, name: str = "bench.json") -> None:
    (results / folder).mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (results / folder / name).write_text(text, encoding="utf-8")


def test_a_machine_as_the_model_says_has_no_error_with_its_dense_row(tmp_path: Path) -> None:
    write(tmp_path, "machine", bench())
    found = read_measured(tmp_path)
    assert found.refused == []
    decode, prompt = found.series
    assert (decode.machine, decode.setting, decode.kind) == ("machine", "2 threads", "decode")
    assert [p.name for p in decode.points] == ["dense", *(f"skip {n}" for n in SKIPS)]
    assert decode.share == pytest.approx(0.8)
    errors = decode.errors()
    assert errors["fitted"].values == pytest.approx([0.0] * 3, abs=1e-9)
    # Nothing fitted: bytes are read with 0.9 instead of 0.8 of the bandwidth.
    assert len(errors["fixed"].values) == 4 and errors["fixed"].bias < -0.1
    before = Machine(20.0, CPU_SHARE, CPU_PHASES, CPU_LATENCY)
    assert decode.dense.fixed == pytest.approx(
        1e3 * dense_seconds(before, CONFIG, BF16, context=128)
    )
    assert errors["fixed_speedup"].largest < 0.01
    assert prompt.rate == pytest.approx(flops_of_prompt(CONFIG, 512, 0.0, routers=False) / 1e9)
    assert prompt.errors()["fitted"].values == pytest.approx([1 / 1.1 - 1])
    assert "fixed" not in prompt.errors()
    assert [p.spread for p in decode.points] == [0.0] * 4
    assert prompt.dense.spread == pytest.approx(0.5)


def test_one_thread_waits_for_nobody(tmp_path: Path) -> None:
    rows = decode_rows({None: 0.02, 0: 0.021}, threads=1)
    content = bench(decode=rows, prompt=[], read_bandwidth_gb_per_s={"1": 20.0})
    write(tmp_path, "machine", content)
    (series,) = read_measured(tmp_path).series
    assert series.setting == "1 thread"
    assert series.share == pytest.approx(dense_bytes(CONFIG, BF16, context=128) / 0.02 / 20e9)


def test_the_width_of_adapters_is_that_of_the_ideal_line(tmp_path: Path) -> None:
    own = shape_config("smollm2-135m", 4)
    rows = decode_rows({None: 0.02, 5: 0.018})
    rows[1]["ideal"] = ideal_speedup(own, 5, context=128)
    write(tmp_path, "machine", bench(decode=rows, prompt=[]))
    (series,) = read_measured(tmp_path).series
    fitted = Machine(20.0, series.share or 0.0, CPU_PHASES, CPU_LATENCY)
    wanted = token_seconds(fitted, own, BF16, 5, context=128)
    assert series.points[1].fitted == pytest.approx(1e3 * wanted)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "not a file of measurements: JSONDecodeError"),
        ([], "not a file of measurements: TypeError"),
        ({"decode": []}, "not a file of measurements: KeyError"),
        (bench(format="flexidepth-bench-9"), "its format is 'flexidepth-bench-9'"),
        (bench(model="gpt-2"), "its model is 'gpt-2'; wanted one of smollm2-135m, "),
        (bench(dtype="int3"), "its type is 'int3'; wanted one of bfloat16, "),
        (bench(decode=[{**decode_rows({5: 0.1})[0], "ideal": 9.9}]), "its ideal line is that of no"),
        (bench(decode=decode_rows({5: 0.1}), prompt=[]), "it has no dense row"),
        (bench(decode=decode_rows({None: 1e-5}), prompt=[]), "its phases alone would take"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_compared_is_said(tmp_path: Path, content: object, why: str) -> None:
    write(tmp_path, "bad", content)
    write(tmp_path, "good", bench())
    found = read_measured(tmp_path)
    assert len(found.series) == 2
    (refused,) = found.refused
    assert refused.file == "bad/bench.json" and why in refused.why


def gpu_check(**changes: Any) -> dict[str, Any]:
    """A check of a device that is as the model says, at 0.9 of a copy of 3000 GB/s."""
    config = model_config("llama-3-8b")
    machine = Machine(3000.0, 0.9, CUDA_PHASES, CUDA_LATENCY)

    def row(batch: int, skipped: int | None) -> GpuDecodeRow:
        if skipped is None:
            seconds = dense_seconds(machine, config, BF16, rows=batch, context=128)
        else:
            layers = layers_of_token(config, skipped)
            if batch == 2:  # half of 16 layers: a quarter is skipped by both, a quarter run by both
                layers = Layers(2, 12, 12, 16)
            seconds = step_seconds(machine, config, BF16, layers, context=128)
        return GpuDecodeRow(batch, 128, skipped, 1e3 * seconds, 0, 0, 0, 0, 1, 1)

    report = EngineReport("llama-3-8b", True, 16)
    report.decode = [row(1, None), row(1, 0), row(1, 8), row(2, None), row(2, 8)]
    report.prompts = [GpuPromptRow(2048, share, 1.0, 0, 0, 1, 1) for share in (None, 0.5)]
    return {"bandwidth": 3000e9, "engines": [report.to_dict()], **changes}


def test_a_check_of_a_device_is_compared_too(tmp_path: Path) -> None:
    write(tmp_path, "device", gpu_check(), "gpu_check.json")
    found = read_measured(tmp_path)
    assert found.refused == []
    one, two, prompt = found.series
    assert one.setting == "batch 1, context 128, kernels overlap"
    assert two.setting == "batch 2, context 128, kernels overlap"
    for series, points in ((one, 2), (two, 1)):
        assert series.share == pytest.approx(0.9)
        assert series.errors()["fitted"].values == pytest.approx([0.0] * points, abs=1e-9)
    assert prompt.setting == "prompt of 2048, kernels overlap"
    assert prompt.errors()["fitted"].bias < -0.2  # skipping half gained nothing in this file


def test_a_check_of_an_unknown_model_is_said(tmp_path: Path) -> None:
    engines = [{**gpu_check()["engines"][0], "model": "gpt-2"}]
    write(tmp_path, "device", gpu_check(engines=engines), "gpu_check.json")
    (refused,) = read_measured(tmp_path).refused
    assert refused.file == "device/gpu_check.json" and "its model is 'gpt-2'" in refused.why


def test_errors_by_hand() -> None:
    errors = Errors.of([(1.1, 1.0), (0.7, 1.0), (None, 1.0)])
    assert errors.values == pytest.approx([0.1, -0.3])
    assert (errors.mean, errors.bias, errors.largest) == pytest.approx((0.2, -0.1, 0.3))


def test_speedups_are_compared_over_the_dense_rows_of_either_side() -> None:
    points = [Point("dense", None, 10, 8, None), Point("skip 5", 5, 8, 5, 7)]
    series = Series("m", "model", "bfloat16", "1 thread", "decode", 0.9, None, points)
    errors = series.errors()
    assert errors["fixed"].values == pytest.approx([8 / 10 - 1, 5 / 8 - 1])
    assert errors["fixed_speedup"].values == pytest.approx([1.6 / 1.25 - 1])
    assert errors["fitted"].values == pytest.approx([7 / 8 - 1])
    together = pooled([series, series], "decode")
    assert together["fixed"].mean == errors["fixed"].mean and len(together["fixed"].values) == 4
    assert pooled([series], "prompt") == {}


def test_every_committed_row_of_ours_is_compared(results: Path) -> None:
    found = read_measured(results)
    assert found.refused == []
    files = sorted(results.glob("*/bench.json"))
    assert len(files) >= 2
    for path in files:
        rows = read_results(path).rows
        for kind in ("decode", "prompt"):
            wanted = [row.name for row in rows if row.kind == kind and not row.peer]
            own = [s for s in found.series if (s.machine, s.kind) == (path.parent.name, kind)]
            assert sorted(p.name for s in own for p in s.points) == sorted(wanted)
