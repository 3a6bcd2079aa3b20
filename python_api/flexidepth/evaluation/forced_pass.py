"""Given tokens through the engine: log-probabilities of asked tokens, many sequences in a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..routing import ForcedRouting

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine, KVCache, StepResult


@dataclass
class Job:
    """Tokens to append to a cache, and what is asked about what follows them.

    cache: of the sequence, each in one job at most. ids: token ids. asked: (i, token) pairs in order of i: the
    log-probability of `token` behind ids[i]. counted: whether each token's layers count, None = all do.

    Filled in: logprobs float32 [asked]; best int64 [asked], the likeliest token there; ran, how many
    (token, routed layer) pairs ran, of tokens that count.
    """

    cache: KVCache
    ids: Sequence[int]
    asked: Sequence[tuple[int, int]]
    counted: Sequence[bool] | None = None
    logprobs: Tensor = field(default_factory=lambda: torch.empty(0))
    best: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    ran: int = 0


@dataclass(frozen=True)
class _Piece:
    """Part of a job in one engine call: ids[start:stop] in the rows from `row` on."""

    job: Job
    start: int
    stop: int
    row: int


def run_jobs(
    engine: Engine,
    jobs: Sequence[Job],
    routing: ForcedRouting,
    thresholds: Tensor | None,
) -> None:
    """Run jobs, filling each engine call with as many rows as it takes.

    Neither the company in a call nor where a job is cut changes any bit of the result.
    """
    for pieces in _calls(jobs, engine.max_rows):
        parts = [piece.job.ids[piece.start : piece.stop] for piece in pieces]
        ids = torch.tensor([token for part in parts for token in part], dtype=torch.int32)
        masks = [
            routing.rows(p.job.cache.length, p.job.cache.length + p.stop - p.start) for p in pieces
        ]
        known = [mask for mask in masks if mask is not None]
        asked = [_asked(piece) for piece in pieces]
        rows = sorted({row for pairs in asked for row, _ in pairs})
        step = engine.forward(
            ids,
            [piece.stop - piece.start for piece in pieces],
            [piece.job.cache for piece in pieces],
            routing=routing.mode,
            mask=torch.cat(known) if known else None,
            thresholds=thresholds,
            logits_rows=torch.tensor(rows, dtype=torch.int32),
        )
        _collect(step, pieces, asked, {row: i for i, row in enumerate(rows)})


def _calls(jobs: Sequence[Job], max_rows: int) -> Iterator[list[_Piece]]:
    """Jobs in order, cut where a call is full."""
    pieces: list[_Piece] = []
    row = 0
    for job in jobs:
        start = 0
        while start < len(job.ids):
            stop = min(len(job.ids), start + max_rows - row)
            pieces.append(_Piece(job, start, stop, row))
            row += stop - start
            start = stop
            if row == max_rows:
                yield pieces
                pieces, row = [], 0
    if pieces:
        yield pieces


def _asked(piece: _Piece) -> list[tuple[int, int]]:
    """(row of the call, token) of what is asked within a piece."""
    return [
        (piece.row + at - piece.start, token)
        for at, token in piece.job.asked
        if piece.start <= at < piece.stop
    ]


def _collect(
    step: StepResult,
    pieces: Sequence[_Piece],
    asked: Sequence[Sequence[tuple[int, int]]],
    place: dict[int, int],
) -> None:
    """Hand each job its results; the logits live until the next call only."""
    normalizer = step.logits.logsumexp(-1)
    best = step.logits.argmax(-1)
    for piece, pairs in zip(pieces, asked, strict=True):
        job, ran = piece.job, step.ran[piece.row : piece.row + piece.stop - piece.start]
        if job.counted is not None:
            ran = ran[torch.tensor(job.counted[piece.start : piece.stop], dtype=torch.bool)]
        job.ran += int(ran.sum())
        if pairs:
            at = torch.tensor([place[row] for row, _ in pairs])
            tokens = torch.tensor([token for _, token in pairs])
            job.logprobs = torch.cat([job.logprobs, step.logits[at, tokens] - normalizer[at]])
            job.best = torch.cat([job.best, best[at]])
