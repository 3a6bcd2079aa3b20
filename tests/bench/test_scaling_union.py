"""Layers that a batch needs: closed forms against enumeration and simulation, and the file of recorded decisions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from flexidepth.bench.scaling.costs import dense_bytes, step_bytes
from flexidepth.bench.scaling.precision import BF16
from flexidepth.bench.scaling.recorded import (
    RecordedSequence,
    Recording,
    read_recording,
)
from flexidepth.bench.scaling.shapes import shape_config
from flexidepth.bench.scaling.union import (
    Masks,
    independent_layers,
    recorded_layers,
    simulate_independent,
    simulate_recorded,
    skip_rates,
)
from flexidepth.errors import CheckpointError, ValueOutOfRangeError

DRAWS = 20_000


def random_masks(
    sequences: int, routed: int, seed: int = 0, agreement: float = 0.0
) -> list[npt.NDArray[np.uint8]]:
    """Sequences of different lengths and habits; with `agreement` 1 all of them skip the same layers."""
    generator = np.random.default_rng(seed)
    shared = generator.random(routed)
    masks = []
    for number in range(sequences):
        own = agreement * np.round(shared) + (1 - agreement) * generator.random(routed)
        masks.append((generator.random((5 + 3 * number, routed)) >= own).astype(np.uint8))
    return masks


def test_one_row_reads_what_it_runs() -> None:
    layers = independent_layers([0.25, 0.5], 1)
    assert (layers.running, layers.skipping, layers.attending) == (1.25, 0.75, 1.25)


def test_two_rows_by_hand() -> None:
    """Skipped by a quarter and by half: both skip with 1/16 and 1/4, both run with 9/16 and 1/4."""
    layers = independent_layers([0.25, 0.5], 2)
    assert layers.running == pytest.approx(15 / 16 + 3 / 4)
    assert layers.skipping == pytest.approx(7 / 16 + 3 / 4)
    assert layers.attending == pytest.approx(2 * 1.25)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_independent_rows_simulated(rows: int) -> None:
    rates = [0.0, 0.1, 0.5, 0.9, 1.0]
    check_simulation(independent_layers(rates, rows), simulate_independent(rates, rows, DRAWS, 1))


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("agreement", [0.0, 0.5, 1.0])
def test_recorded_rows_simulated(rows: int, agreement: float) -> None:
    masks = random_masks(9, 6, agreement=agreement)
    check_simulation(recorded_layers(masks, rows), simulate_recorded(masks, rows, DRAWS, 2))


def check_simulation(closed: object, drawn: npt.NDArray[np.float64]) -> None:
    wanted = [getattr(closed, name) for name in ("running", "skipping", "attending")]
    error = drawn.std(axis=0, ddof=1) / DRAWS**0.5
    # what is never seen in so many draws may still have a small chance
    assert np.all(np.abs(drawn.mean(axis=0) - wanted) <= 4.5 * error + 4 / DRAWS)


def test_a_simulation_is_the_same_again_and_another_with_another_seed() -> None:
    masks = random_masks(4, 5)
    draws: list[Callable[[int], npt.NDArray[np.float64]]] = [
        lambda seed: simulate_independent([0.5] * 5, 2, 100, seed),
        lambda seed: simulate_recorded(masks, 2, 100, seed),
    ]
    for draw in draws:
        assert np.array_equal(draw(3), draw(3))
        assert not np.array_equal(draw(3), draw(4))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_recorded_rows_are_the_mean_over_all_choices_and_places(rows: int) -> None:
    masks = [mask[:3] for mask in random_masks(3, 4)]
    counts = []
    for chosen in itertools.combinations(masks, rows):
        for tokens in itertools.product(*chosen):
            run = np.stack(tokens).astype(bool)
            counts.append((run.any(0).sum(), (~run).any(0).sum(), run.sum()))
    layers = recorded_layers(masks, rows)
    found = (layers.running, layers.skipping, layers.attending)
    assert found == pytest.approx(tuple(np.mean(counts, axis=0)))


def test_sequences_of_one_habit_are_independent_rows() -> None:
    masks = [np.array([[1, 0, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1]], dtype=np.uint8)] * 4
    rates = skip_rates(masks)
    assert rates.tolist() == [0, 0.75, 0.5]
    together, apart = recorded_layers(masks, 3), independent_layers(rates.tolist(), 3)
    assert vars(together) == pytest.approx(vars(apart))


def test_too_few_sequences_are_refused() -> None:
    masks: Masks = random_masks(3, 4)
    for function in (recorded_layers, lambda m, n: simulate_recorded(m, n, 10, 0)):
        with pytest.raises(ValueOutOfRangeError, match="3 recorded sequences for a batch of 4"):
            function(masks, 4)


def test_the_ideal_of_a_batch_falls() -> None:
    """Llama-3-8B, half of the routed layers skipped at random: known figures without the adapters' bytes."""
    config = shape_config("llama-3-8b")
    dense = dense_bytes(config, BF16)
    ideals = []
    for rows in (1, 2, 3, 4):
        layers = independent_layers([0.5] * 16, rows)
        ideals.append(dense / step_bytes(config, BF16, layers))
    assert ideals == pytest.approx([1.262, 1.098, 1.032, 1.001], abs=5e-3)


def recording(routed: int = 5) -> Recording:
    masks = random_masks(3, routed)
    sequences = [RecordedSequence("list", 2, mask) for mask in masks]
    levels = {"fast": sequences, "none": [RecordedSequence("copy", 0, masks[0][:0])]}
    return Recording("some model", "0f", 9, list(range(9 - routed, 9)), "a command", levels)


@pytest.mark.parametrize("routed", [1, 4, 5, 15, 17])
def test_a_recording_comes_back_as_it_was(tmp_path: Path, routed: int) -> None:
    made = recording(routed)
    made.save(tmp_path / "routing.json")
    read = read_recording(tmp_path / "routing.json")
    assert (read.model, read.num_layers, read.command) == ("some model", 9, "a command")
    assert read.routing_layers == made.routing_layers
    assert list(read.levels) == ["fast", "none"]
    for level, sequences in made.levels.items():
        for own, other in zip(sequences, read.levels[level], strict=True):
            assert (own.kind, own.prompt_length) == (other.kind, other.prompt_length)
            assert np.array_equal(own.ran, other.ran) and other.ran.shape[1] == routed
            assert np.array_equal(other.decoded, own.ran[own.prompt_length :])


@pytest.mark.parametrize("ran", ["1f2", "ff", "0g", 3])
def test_a_damaged_recording_is_refused(tmp_path: Path, ran: object) -> None:
    path = tmp_path / "routing.json"
    recording().save(path)
    content = json.loads(path.read_text())
    content["levels"]["fast"][0]["ran"] = ran
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="not a recording"):
        read_recording(path)


def test_another_file_is_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "routing.json"
    for text in ("{", "[]", '{"format": "flexidepth-routing-1"}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="not a recording"):
            read_recording(path)


def test_the_committed_recording_is_of_the_shipped_routers(results: Path) -> None:
    from flexidepth.checkpoints import source

    config = json.loads((source.PRETRAINED / "smollm2-135m" / "config.json").read_text())
    read = read_recording(results / "scaling" / "routing.json")
    assert read.routing_layers == config["routing_layers"]
    assert set(read.levels) == set(config["skip_presets"])
    skipped = [
        skip_rates([one.decoded for one in read.levels[level]]).sum()
        for level in ("quality", "balanced", "fast")
    ]
    assert 0.5 < skipped[0] < skipped[1] < skipped[2] < 10
