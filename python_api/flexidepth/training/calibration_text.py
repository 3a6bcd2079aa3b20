"""Documents as the token sequences that a calibration runs over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import UnsupportedError
from .documents import Document
from .tokenization import check_tokenizer, tokenize


def token_sequences(
    documents: Iterable[Document], tokenizer: Any | None, *, tokens: int, length: int
) -> list[list[int]]:
    """Ids of the documents from the first on, `length` each at most, until there are `tokens`.

    A longer document is cut into several sequences; conversations go through the chat template.

    Raises:
        UnsupportedError: no tokenizer, or a conversation for one without a chat template.
    """
    if tokenizer is None:
        raise UnsupportedError(
            "calibrate: this model came without a tokenizer, so text means nothing to it"
        )
    check_tokenizer(tokenizer, "all")
    sequences: list[list[int]] = []
    left = tokens
    for document in documents:
        ids = tokenize(document, tokenizer)[0].tolist()
        for start in range(0, len(ids), length):
            if left <= 0:
                return sequences
            piece = ids[start : start + min(length, left)]
            sequences.append(piece)
            left -= len(piece)
    return sequences
