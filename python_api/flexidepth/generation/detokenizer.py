"""From token ids to text piece by piece: all pieces together are the decode of all ids at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token that stands for one byte (byte fallback)
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one growing sequence of tokens.

    Only a window of the last ids is decoded. It begins with ids whose text is out already, because
    decoders treat the beginning of a text in their own way (SentencePiece drops its leading space). Text that
    may still change waits: an unfinished character, and a run of byte tokens, which decodes to
    replacement characters as a whole where any of its bytes is wrong.

    Args:
        tokenizer: a transformers tokenizer, fast or not.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool) -> None:
        self._token, self._decode, special = _vocabulary(tokenizer)
        self._skipped = special if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._read = 0  # ids of the window whose text is out: _prefix
        self._prefix = ""

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became certain, possibly empty."""
        token = self._token(token_id)
        # As a whole decode does it: what is left out does not even interrupt a run of bytes.
        if token is None or token_id in self._skipped:
            return ""
        self._window.append(token_id)
        if _BYTE.fullmatch(token):
            return ""
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The text that waited, as a whole decode shows it."""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        """Take `text`, the decode of the window, as certain; returns what of it is new."""
        piece = text[len(self._prefix) :]
        fresh = self._window[self._read :]
        prefix = self._decode(fresh)
        # Without text of its own the new part could not take the loss of a leading space.
        self._window, self._prefix = (fresh, prefix) if prefix else (self._window, text)
        self._read = len(self._window)
        return piece


def _vocabulary(
    tokenizer: Any,
) -> tuple[Callable[[int], str | None], Callable[[list[int]], str], frozenset[int]]:
    """(token of an id or None, text of ids with special tokens, ids of the special tokens)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        added = backend.get_added_tokens_decoder()
        return (
            backend.id_to_token,
            lambda ids: str(backend.decode(ids, skip_special_tokens=False)),
            frozenset(i for i, token in added.items() if token.special),
        )
    return (
        tokenizer.convert_ids_to_tokens,
        lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)),
        frozenset(tokenizer.all_special_ids),
    )
