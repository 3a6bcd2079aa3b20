"""Predictions of decoding steps: their arithmetic, the engine's own kernels, and the tables of docs/gpu-notes.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.gpu import predictions
from bench.gpu.costs import CostRow
from bench.gpu.engine_report import prediction_lines
from bench.gpu.engine_timing import DecodeRow
from bench.gpu.predictions import (
    LAYER_THAT_RUNS,
    LAYER_THAT_SKIPS,
    Device,
    Kernels,
    assumed_devices,
    beside,
    data_sheet,
    measured_device,
    predict,
    prediction_table,
    step_kernels,
)
from bench.ideal import bytes_per_token
from bench.models import model_config, random_weights
from flexidepth_ext.cuda_decode import Sampling
from flexidepth_ext.cuda_engine import CudaEngine

from .runtime import FakeRuntime

NOTES = Path(__file__).resolve().parents[2] / "docs" / "gpu-notes.md"


def row(skipped, ms, batch=1):
    return DecodeRow(batch, 128, skipped, ms, ms, 1e3 / ms, 1.0, 0.5, 1.0, 1.0)


def cost(key, median):
    return CostRow(key, "us", median, median, median)


def test_kernels_of_a_step():
    large = model_config("llama-3-8b")
    assert step_kernels(large, None) == Kernels(5 + 32 * 5)
    assert step_kernels(large, 0) == Kernels(5 + 16 * 5 + 16 * 6)
    assert step_kernels(large, 16) == Kernels(5 + 16 * 5 + 16 * 3, 16 * 3)
    assert LAYER_THAT_RUNS.all == LAYER_THAT_SKIPS.all  # one graph serves both


def test_the_arithmetic():
    """By hand: 15.01 GB in 4.8 TB/s, 165 phases."""
    config = model_config("llama-3-8b")
    dense = predict(config, None, 0, Device("x", 4.8e12, (2.0, 3.0)))
    read = bytes_per_token(config, 0, routers=False)
    assert read == pytest.approx(15.01e9, rel=1e-3)
    assert dense.ms == pytest.approx((read / 4.8e9 + 0.33, read / 4.8e9 + 0.495))
    assert dense.speedup == (1, 1) and dense.of_ideal == (1, 1)
    free = predict(config, 16, 0, Device("x", 4.8e12, (0.0, 0.0), 0.0))  # bytes alone
    assert free.speedup == pytest.approx((1.722, 1.722), abs=1e-3)
    assert free.of_ideal == pytest.approx((1, 1))
    paid = predict(config, 16, 0, Device("x", 4.8e12, (0.0, 0.0), 1.0))
    assert paid.ms[0] == pytest.approx(free.ms[0] + 48e-3)


def test_what_a_device_is_taken_for():
    assert data_sheet("NVIDIA H200 NVL") == Device("H200's data sheet", 4.8e12)
    assert data_sheet("NVIDIA H100 80GB HBM3") == Device("H100's data sheet", 3.35e12)
    assert data_sheet("NVIDIA A100") is None
    rows = [cost("read", 4000.0), cost("phase", 2.0), cost("idle_1000", 0.9)]
    own = Device("this card's costs", 4e12, (2.0, 2.0), 0.9)
    assert measured_device(rows, overlap=False) == own
    assert measured_device(rows, overlap=True) is None
    assert measured_device([CostRow("read", "GB/s", None, None, None, "no")], False) is None
    assert [d.name for d in assumed_devices("H100", rows, False)] == [
        "H100's data sheet",
        "this card's costs",
    ]
    assert assumed_devices("some card", [], False) == []


def test_predictions_beside_measurements():
    config, device = model_config("llama-3-8b"), Device("a card", 4.8e12)
    rows = beside(config, [row(None, 4.0), row(8, 3.2), row(8, 5.0, batch=2)], [device])
    assert [(r.skipped, r.measured_ms) for r in rows] == [(None, 4.0), (8, 3.2)]
    assert (rows[1].ms_low, rows[1].ms_high) == predict(config, 8, 128, device).ms
    text = "\n".join(prediction_lines(rows))
    assert "| 128 | dense | a card | 3.527 to 3.593 | 4.000 | 1.11 to 1.13 |" in text
    assert prediction_lines([]) == []


def test_the_notes_hold_what_the_arithmetic_says():
    text = NOTES.read_text(encoding="utf-8")
    for lines in (prediction_table(), predictions.experiment_table()):
        assert "\n".join(lines) in text, "run python -m bench.gpu.predictions and put it there"


@pytest.mark.parametrize(
    "routing",
    [
        "dense",
        "router",
    ],
)
def test_the_engine_queues_the_kernels_that_are_counted(emulated, routing):
    config = model_config("tiny")
    weights = random_weights(config, torch.bfloat16, "cpu")
    engine = CudaEngine(
        config, weights, dtype=torch.bfloat16, persistent=False, runtime=FakeRuntime(emulated)
    )
    run = engine.decode([engine.new_cache(8)], [1], Sampling(), seeds=[0], routing=routing)
    run.launch()  # captures the graph, for which kernels run as well
    run.collect()
    before = emulated.launches()
    run.launch()
    run.collect()
    queued = emulated.launches() - before
    engine.close()
    assert queued == step_kernels(config, None if routing == "dense" else 0).all
