"""Sequences that begin alike as one sequence: what they share once, then what each goes on with.

A token sees what is shared and what is before it in its own continuation. One pass computes a question and all of its
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_PADDING = -1


@dataclass
class TokenTree:
    """ids: tokens of the root, then of each branch. root: how many are the root's. owners: of each token, 0 for the
    root, else the number of its branch. rows: of each token behind the root, its row in the call it comes from."""

    ids: list[int]
    root: int
    owners: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    branches: int = 0

    def grow(self, ids: Sequence[int], first_row: int) -> None:
        """Add a branch, whose tokens are the rows from first_row on."""
        self.branches += 1
        self.ids += ids
        self.owners += [self.branches] * len(ids)
        self.rows += range(first_row, first_row + len(ids))

    def padded_ids(self, length: int) -> Tensor:
        """int64 [length]."""
        return torch.tensor(self.ids + [0] * (length - len(self.ids)))

    def positions(self, length: int) -> Tensor:
        """int64 [length]: where each token stands in its own sequence."""
        found, at = list(range(self.root)), self.root
        for i in range(self.root, len(self.ids)):
            new = i == self.root or self.owners[i] != self.owners[i - 1]
            at = self.root if new else at + 1
            found.append(at)
        return torch.tensor(found + [0] * (length - len(found)))

    def visible(self, length: int) -> Tensor:
        """bool [length, length]: may the first see the second, were it later."""
        owners = torch.tensor(self.owners + [_PADDING] * (length - len(self.owners)))
        return (owners[None] == 0) | (owners[None] == owners[:, None])


def plant_trees(
    histories: Sequence[tuple[int, ...]], parts: Sequence[tuple[int, ...]], *, joined: bool
) -> list[TokenTree]:
    """Trees of sequences; each goes on from its history with its part, whose tokens are the next rows.

    Args:
        joined: sequences of one history, unless it is empty, become one tree; else each is its own.
    """
    trees: list[TokenTree] = []
    known: dict[tuple[int, ...], TokenTree] = {}
    row = 0
    for history, part in zip(histories, parts, strict=True):
        tree = known.get(history)
        if tree is None:
            tree = TokenTree(list(history), len(history), [0] * len(history))
            trees.append(tree)
            if joined and history:
                known[history] = tree
        tree.grow(part, row)
        row += len(part)
    return trees
