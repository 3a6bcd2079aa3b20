"""Packing loses nothing, and a packed document has the logits that it has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flexidepth.training.packing import (
    COLUMNS,
    PackingCounts,
    block_causal_mask,
    collate,
    pack,
)
from tests.engine.conftest import VOCAB, tiny_config, tiny_model

LENGTH = 40


def documents(lengths: list[int], seed: int = 0) -> list[tuple[Any, Any]]:
    """Random ids, about half of them to be predicted, the second always."""
    draw = np.random.default_rng(seed)
    made = []
    for length in lengths:
        predicted = draw.random(length) < 0.5
        predicted[1:2] = True
        made.append((draw.integers(1, VOCAB, length, dtype=np.int32), predicted))
    return made


def packed(lengths: list[int], length: int = LENGTH) -> tuple[list[Any], PackingCounts]:
    counts = PackingCounts()
    return list(pack(iter(documents(lengths)), length, counts, pad_id=0)), counts


def pieces(rows: list[Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document, checked against positions."""
    found = []
    for row in rows:
        for number in range(row["document_ids"].max() + 1):
            (places,) = np.nonzero(row["document_ids"] == number)
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            assert row["position_ids"][places].tolist() == list(range(len(places)))
            found.append((row["input_ids"][places].tolist(), row["labels"][places].tolist()))
    return found


def test_every_document_is_there_once_with_its_labels() -> None:
    lengths = [17, 40, 3, 39, 1, 95, 2, 23, 23, 80, 7]
    rows, counts = packed(lengths)
    wanted = []
    for ids, predicted in documents(lengths):
        for start in range(0, len(ids), LENGTH):
            part = slice(start, start + LENGTH)
            labels = np.where(predicted[part], ids[part], -100)
            labels[0] = -100
            if (labels != -100).any():
                wanted.append((ids[part].tolist(), labels.tolist()))
    assert sorted(pieces(rows)) == sorted(wanted)
    assert all(row[name].shape == (LENGTH,) for row in rows for name in COLUMNS)
    for row in rows:
        padding = row["document_ids"] == -1
        assert (row["labels"][padding] == -100).all()
        assert (row["input_ids"][padding] == 0).all()
    assert counts.documents == len(lengths)
    assert counts.tokens == sum(len(ids) for ids, _ in wanted)
    assert counts.trained_tokens == sum(sum(x != -100 for x in labels) for _, labels in wanted)
    assert counts.sequences == len(rows)
    assert counts.tokens + counts.padding == LENGTH * len(rows)
    assert counts.pieces == len(wanted) + counts.dropped
    assert counts.dropped >= 1  # the document of one token


@pytest.mark.parametrize("longest", [30, 400])
def test_little_padding_and_always_the_same(longest: int) -> None:
    lengths = np.random.default_rng(1).integers(2, longest, 6000).tolist()
    rows, counts = packed(lengths, 256)
    assert counts.padding_share < 0.01
    again, _ = packed(lengths, 256)
    assert all(
        np.array_equal(a[n], b[n]) for a, b in zip(rows, again, strict=True) for n in COLUMNS
    )


def test_nothing_to_predict_is_dropped() -> None:
    counts = PackingCounts()
    ids = np.ones(50, np.int32)
    # Only the first token of each piece: it has nothing before it.
    predicted = np.arange(50) % LENGTH == 0
    assert list(pack([(ids, predicted)], LENGTH, counts)) == []
    assert (counts.documents, counts.pieces, counts.dropped) == (1, 2, 2)


def test_a_batch_is_what_forward_takes() -> None:
    rows, _ = packed([17, 20, 33, 5])
    batch = collate(rows)
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, [2, LENGTH]),
        "labels": (torch.int64, [2, LENGTH]),
        "position_ids": (torch.int64, [2, LENGTH]),
        "attention_mask": (torch.bool, [2, 1, LENGTH, LENGTH]),
    }
    whole = collate(rows, document_ids=True)
    assert torch.equal(block_causal_mask(whole["document_ids"]), batch["attention_mask"])


@pytest.mark.parametrize("sliding_window", [None, 5])
@torch.no_grad()
def test_packed_documents_have_the_logits_they_have_alone(sliding_window: int | None) -> None:
    # In float64 a gate cannot flip because sums are taken in another order.
    model = tiny_model(tiny_config(sliding_window=sliding_window)).double()
    lengths = [17, 20, 33, 5, 11, 8, 23, 2]
    rows, _ = packed(lengths)
    batch = collate(rows)
    out = model(**batch)
    assert bool(out.run.any()) and not bool(out.run.all())
    ids = batch["document_ids"] = torch.stack([torch.tensor(r["document_ids"]) for r in rows])
    compared, losses, labelled = 0, torch.zeros((), dtype=torch.float64), 0
    for row in range(len(rows)):
        for number in range(int(ids[row].max()) + 1):
            places = ids[row] == number
            alone = model(batch["input_ids"][row, places][None])
            torch.testing.assert_close(out.logits[row, places], alone.logits[0], rtol=0, atol=1e-9)
            assert torch.equal(out.run[row, places], alone.run[0])
            labels = batch["labels"][row, places]
            losses += F.cross_entropy(
                alone.logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum"
            )
            labelled += int((labels != -100).sum())
            compared += 1
    assert compared == len(lengths)
    torch.testing.assert_close(out.loss.double(), losses / labelled, rtol=1e-6, atol=0)
    # Under a mask that is merely causal they have others, or the above would prove nothing.
    merely_causal = model(
        batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    assert (merely_causal - out.logits)[ids > 0].abs().max() > 1e-2
