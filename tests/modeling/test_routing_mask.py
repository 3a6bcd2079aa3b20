"""Masks of every kind a user may have at hand, and what is said about those that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flexidepth.errors import DtypeError, ShapeError, ValueOutOfRangeError
from flexidepth.routing import resolve_force_routing

from ..engine.conftest import tiny_config, tiny_model

ROWS = [[1, 0, 1], [0, 0, 1]]
BOOLS = [[bool(value) for value in row] for row in ROWS]


@pytest.mark.parametrize(
    "mask",
    [
        ROWS,
        BOOLS,
        tuple(map(tuple, BOOLS)),
        [torch.tensor(row) for row in BOOLS],
        [np.array(row) for row in BOOLS],
        torch.tensor(BOOLS),
        torch.tensor(ROWS),
        torch.tensor(ROWS, dtype=torch.uint8),
        torch.tensor(ROWS).T.contiguous().T,
        np.array(BOOLS),
        np.array(ROWS),
        np.array(ROWS, dtype=np.uint8),
        np.array(ROWS, dtype=np.uint16),
        np.array(ROWS, dtype=np.int8),
        np.array(BOOLS, order="F"),
        np.array(BOOLS)[::-1][::-1],
    ],
)
def test_every_mask_means_the_same(mask):
    want = resolve_force_routing(torch.tensor(BOOLS), tiny_config())
    got = resolve_force_routing(mask, tiny_config())
    assert (got.mode, got.key) == ("forced", want.key)
    rows = got.rows(0, 2)
    assert rows.dtype == torch.uint8 and rows.tolist() == ROWS


@pytest.mark.parametrize("mask", [np.array(ROWS, dtype=np.uint8), torch.tensor(ROWS).byte()])
def test_a_mask_is_copied(mask):
    routing = resolve_force_routing(mask, tiny_config())
    mask[0, 0] = 0
    assert routing.rows(0, 2).tolist() == ROWS


@torch.no_grad()
def test_the_model_takes_an_array(ids):
    model = tiny_model(tiny_config())
    mask = np.arange(120).reshape(40, 3) % 2 == 0
    want = model(ids, force_routing=torch.from_numpy(mask))
    assert torch.equal(model(ids, force_routing=mask).logits, want.logits)
    assert torch.equal(model(ids, force_routing=mask.tolist()).logits, want.logits)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.ones((2, 2), bool), ShapeError, r"mask is \[2, 2\]; wanted \[tokens, 3\]"),
        (np.ones((1, 2, 3), bool), ShapeError, r"mask is \[1, 2, 3\]"),
        (np.array([1, 3]), ShapeError, r"mask is \[2\].*layers to run go in a plain list"),
        ([[]], ShapeError, r"mask is \[1, 0\]"),
        ([[1, 0], [1, 0]], ShapeError, r"mask is \[2, 2\]"),
        ([[1, 0, 1], [1, 0]], ShapeError, r"rows have lengths \[3, 2\]"),
        ([[1, 0, 1], 1], ShapeError, r"rows have lengths \[3, '1'\]"),
        (np.array([[0, 1, 2]]), ValueOutOfRangeError, "mask holds 2; wanted True and False"),
        (np.array([[0, 1, -1]], dtype=np.int8), ValueOutOfRangeError, "mask holds -1"),
        ([[0, 1, 7]], ValueOutOfRangeError, "mask holds 7"),
        (np.array([[0.0, 0.25, 1.0]]), ValueOutOfRangeError, "mask holds 0.25.*compare gates"),
        (np.ones((2, 3), np.float32), DtypeError, r"type float32; wanted booleans.*astype\(bool"),
        (torch.ones(2, 3), DtypeError, r"type torch.float32; wanted booleans.*mask.bool\(\)"),
        ([[1.0, 0.0, 1.0]], DtypeError, "type float64"),
        ([["a", "b", "c"]], DtypeError, "begins with 'a'"),
        ([[None, True, True]], DtypeError, "type object and begins with None"),
        (np.ones((2, 3), complex), DtypeError, "type complex128"),
    ],
)
def test_what_is_no_mask_is_refused_with_its_values(mask, error, message):
    with pytest.raises(error, match=message):
        resolve_force_routing(mask, tiny_config())


def test_numbers_of_numpy_are_numbers():
    config = tiny_config()
    layers = resolve_force_routing(list(np.array([1, 3])), config)
    assert layers.key == resolve_force_routing([1, 3], config).key
    assert resolve_force_routing(np.float32(0.5), config).num_skipped == 2
    with pytest.raises(ValueOutOfRangeError, match=r"layers \[0\] are not routed"):
        resolve_force_routing([np.int64(0)], config)
    with pytest.raises(ValueOutOfRangeError, match=r"wanted 'all'.*RoutingReport"):
        resolve_force_routing({1, 3}, config)
