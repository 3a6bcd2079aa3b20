"""Documents packed into sequences of one length, and batches of them in which no document sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .tokenization import IGNORED, Ids, Mask

Columns = dict[str, NDArray[np.int32]]

COLUMNS = ("input_ids", "labels", "position_ids", "document_ids")
PADDING = -1  # document_ids of padding
_WINDOW = 4096  # pieces that are ordered before they are placed
_MOST_OPEN = 512  # sequences that are kept open for pieces to come


@dataclass
class PackingCounts:
    """What was packed. tokens: without padding; trained_tokens: those that are predicted; dropped: pieces in
    which nothing was to be predicted; padding: tokens of padding."""

    documents: int = 0
    pieces: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    sequences: int = 0
    padding: int = 0

    @property
    def padding_share(self) -> float:
        """Share of all places that hold padding."""
        return self.padding / max(1, self.padding + self.tokens)


class _Open:
    """A sequence that still has room."""

    def __init__(self, length: int) -> None:
        self.room = length
        self.pieces: list[tuple[Ids, Mask]] = []

    def put(self, piece: tuple[Ids, Mask]) -> None:
        self.pieces.append(piece)
        self.room -= len(piece[0])


def pack(
    tokenized: Iterable[tuple[Ids, Mask]], length: int, counts: PackingCounts, *, pad_id: int = 0
) -> Iterator[Columns]:
    """Sequences of exactly `length` tokens, in an order that depends on nothing but the input.

    A document longer than `length` is cut into pieces, each of which is then a document of its own. Pieces are
    placed by best fit, the longest of a window of some thousand first, into a bounded number of open sequences.

    Args:
        tokenized: (ids [T], to be predicted [T]) of each document; T >= 1.
        counts: brought up to date while packing.
        pad_id: token at padding.

    Yields:
        int32 [length] each: input_ids; labels, -100 on padding, on the first token of each document and on what is
        not to be predicted; position_ids, from 0 in each document and in the padding; document_ids, from 0,
        -1 on padding.
    """
    opened: list[_Open] = []  # by room, smallest first
    for window in _windows(_pieces(tokenized, length, counts)):
        for piece in sorted(window, key=lambda piece: -len(piece[0])):
            at = bisect_left(opened, len(piece[0]), key=_room)
            sequence = opened.pop(at) if at < len(opened) else _Open(length)
            sequence.put(piece)
            if sequence.room:
                insort(opened, sequence, key=_room)
            else:
                yield _columns(sequence, length, pad_id, counts)
        while len(opened) > _MOST_OPEN:
            yield _columns(opened.pop(0), length, pad_id, counts)
    for sequence in opened:
        yield _columns(sequence, length, pad_id, counts)


def _room(sequence: _Open) -> int:
    return sequence.room


def _windows(pieces: Iterator[tuple[Ids, Mask]]) -> Iterator[list[tuple[Ids, Mask]]]:
    window: list[tuple[Ids, Mask]] = []
    for piece in pieces:
        window.append(piece)
        if len(window) == _WINDOW:
            yield window
            window = []
    yield window


def _pieces(
    tokenized: Iterable[tuple[Ids, Mask]], length: int, counts: PackingCounts
) -> Iterator[tuple[Ids, Mask]]:
    for ids, predicted in tokenized:
        counts.documents += 1
        for start in range(0, len(ids), length):
            counts.pieces += 1
            piece = ids[start : start + length], predicted[start : start + length]
            if piece[1][1:].any():
                yield piece
            else:
                counts.dropped += 1


def _columns(sequence: _Open, length: int, pad_id: int, counts: PackingCounts) -> Columns:
    columns = {
        "input_ids": np.full(length, pad_id, np.int32),
        "labels": np.full(length, IGNORED, np.int32),
        "position_ids": np.zeros(length, np.int32),
        "document_ids": np.full(length, PADDING, np.int32),
    }
    begin = 0
    for number, (ids, predicted) in enumerate(sequence.pieces):
        part = slice(begin, begin + len(ids))
        columns["input_ids"][part] = ids
        columns["labels"][part] = np.where(predicted, ids, IGNORED)
        columns["labels"][begin] = IGNORED
        columns["position_ids"][part] = np.arange(len(ids), dtype=np.int32)
        columns["document_ids"][part] = number
        begin += len(ids)
    columns["position_ids"][begin:] = np.arange(length - begin, dtype=np.int32)
    counts.sequences += 1
    counts.tokens += begin
    counts.padding += length - begin
    counts.trained_tokens += int((columns["labels"] != IGNORED).sum())
    return columns


def block_causal_mask(document_ids: Tensor) -> Tensor:
    """Boolean [batch, 1, T, T], True where a query sees a key: in its own document, itself and what is before it.

    document_ids: [batch, T]. Padding sees padding, which nobody looks at.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


def collate(items: Sequence[dict[str, Any]], *, document_ids: bool = False) -> dict[str, Tensor]:
    """A batch as FlexiDepthForCausalLM.forward takes it: packed documents give the logits they give alone.

    Args:
        items: sequences of one length, as `pack` yields them.
        document_ids: also return these; forward does not take them. -1 tells where the padding is.

    Returns:
        input_ids, labels, position_ids int64 [batch, T]; attention_mask bool [batch, 1, T, T].
        With transformers' Trainer set remove_unused_columns=False, or document_ids never come here.
    """
    batch = {
        name: torch.stack([torch.as_tensor(item[name]) for item in items]).long()
        for name in COLUMNS
    }
    batch["attention_mask"] = block_causal_mask(batch["document_ids"])
    if not document_ids:
        del batch["document_ids"]
    return batch
