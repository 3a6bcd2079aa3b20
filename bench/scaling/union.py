"""Which routed layers a batch needs when each of its rows decides for itself.

A layer's weights are read if any row runs it. With q the share of tokens that skip a layer, B rows that decide
independently run it with probability 1 - q^B, and one of them takes the adapter with 1 - (1 - q)^B. Rows that are
tokens of B different recorded sequences, each at a place of its own, skip it all with probability
e_B(q_1 .. q_S) / C(S, B): the elementary symmetric polynomial of the sequences' shares, over all choices of B
sequences out of S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexidepth.errors import ValueOutOfRangeError

from .costs import Layers

Masks = Sequence[npt.NDArray[np.uint8]]
"""Decisions of sequences, each [tokens, routed layers], 1 = run."""


def independent_layers(skip_rates: Sequence[float], rows: int) -> Layers:
    """Mean layers of a step of `rows` rows; skip_rates: share of tokens that skip each routed layer."""
    rates = np.asarray(skip_rates, dtype=np.float64)
    return _layers(rows, rates**rows, (1 - rates) ** rows, rates)


def recorded_layers(masks: Masks, rows: int) -> Layers:
    """Mean layers of a step of `rows` different sequences out of `masks`, each at a random place.

    ValueOutOfRangeError for fewer sequences than rows.
    """
    _check_enough(masks, rows)
    skips = 1 - np.stack([mask.mean(axis=0) for mask in masks])  # [sequences, routed]
    return _layers(
        rows,
        _mean_product(skips, rows),
        _mean_product(1 - skips, rows),
        skips.mean(axis=0),
    )


def skip_rates(masks: Masks) -> npt.NDArray[np.float64]:
    """Share of tokens that skip each routed layer, every sequence counted alike."""
    rates: npt.NDArray[np.float64] = 1 - np.stack([mask.mean(axis=0) for mask in masks]).mean(
        axis=0
    )
    return rates


def simulate_independent(
    rates: Sequence[float], rows: int, draws: int, seed: int
) -> npt.NDArray[np.float64]:
    """`draws` random steps: [draws, 3], the fields of Layers behind its rows."""
    generator = np.random.default_rng(seed)
    run = generator.random((draws, rows, len(rates))) >= np.asarray(rates)
    return _count(run)


def simulate_recorded(masks: Masks, rows: int, draws: int, seed: int) -> npt.NDArray[np.float64]:
    """`draws` random alignments of `rows` different sequences: [draws, 3], as `simulate_independent`.

    ValueOutOfRangeError for fewer sequences than rows.
    """
    _check_enough(masks, rows)
    generator = np.random.default_rng(seed)
    chosen = generator.random((draws, len(masks))).argsort(axis=1)[:, :rows]
    places = generator.random((draws, rows))
    lengths = np.array([len(mask) for mask in masks])
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    tokens = starts[chosen] + (places * lengths[chosen]).astype(np.int64)
    return _count(np.concatenate(list(masks))[tokens] != 0)


def _mean_product(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Mean over all choices of `count` rows of `values` [rows, columns] of the product of each column."""
    sums = np.zeros((count + 1, values.shape[1]))  # elementary symmetric polynomials, row by row
    sums[0] = 1
    for row in values:
        sums[1:] += row * sums[:-1]
    mean: npt.NDArray[np.float64] = sums[count] / math.comb(len(values), count)
    return mean


def _layers(
    rows: int,
    none_runs: npt.NDArray[np.float64],
    none_skips: npt.NDArray[np.float64],
    rates: npt.NDArray[np.float64],
) -> Layers:
    return Layers(
        rows,
        float((1 - none_runs).sum()),
        float((1 - none_skips).sum()),
        float(rows * (1 - rates).sum()),
    )


def _count(run: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """[draws, rows, routed] to [draws, 3]: layers that one row or more runs, or skips, and rows that run."""
    counts: npt.NDArray[np.float64] = np.stack(
        [run.any(axis=1).sum(axis=1), (~run).any(axis=1).sum(axis=1), run.sum(axis=(1, 2))], axis=1
    ).astype(np.float64)
    return counts


def _check_enough(masks: Masks, rows: int) -> None:
    if len(masks) < rows:
        raise ValueOutOfRangeError(
            f"scaling: {len(masks)} recorded sequences for a batch of {rows}; wanted as many or more"
        )
