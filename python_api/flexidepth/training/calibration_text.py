"""Documents as the token sequences that a calibration runs over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import UnsupportedError
from .documents import Document
from .tokenization import check_tokenizer, tokenize


class TokenSequence(NamedTuple):
    """ids: of the tokens. counted: whether each is of those whose layers are counted."""

    ids: list[int]
    counted: list[bool]


def token_sequences(
    documents: Iterable[Document], tokenizer: Any | None, *, tokens: int, length: int
) -> list[TokenSequence]:
    """The documents from the first on, `length` tokens each at most, until there are `tokens`.

    A longer document is cut into several sequences. Conversations go through the chat template, and of them what
    the assistant says is counted: questions and the template's own tokens skip far more, and it is answers that
    are decoded one by one. Where a tokenizer does not tell which tokens those are, all are counted.

    Raises:
        UnsupportedError: no tokenizer, or a conversation for one without a chat template.
    """
    if tokenizer is None:
        raise UnsupportedError(
            "calibrate: this model came without a tokenizer, so text means nothing to it"
        )
    loss_on = "answers" if tokenizer.is_fast else "all"
    check_tokenizer(tokenizer, loss_on)
    sequences: list[TokenSequence] = []
    left = tokens
    for document in documents:
        ids, counted = (values.tolist() for values in tokenize(document, tokenizer, loss_on))
        for start in range(0, len(ids), length):
            if left <= 0:
                return sequences
            part = slice(start, start + min(length, left))
            sequences.append(TokenSequence(ids[part], counted[part]))
            left -= len(ids[part])
    return sequences
