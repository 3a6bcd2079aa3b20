"""From tokens to text as it streams: never half a character, never half a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedError
from .detokenizer import Detokenizer


class TextStream:
    """Text of one answer.

    `push` returns the text that a token makes certain. Bytes of an unfinished character wait, and so does
    text that may turn out to begin a stop string. `text` is everything returned so far.
    """

    def __init__(
        self, tokenizer: Any | None, stop_strings: Sequence[str], skip_special_tokens: bool
    ) -> None:
        self.text = ""
        self.stopped = False
        self._held = ""
        self._stops = tuple(stop_strings)
        if self._stops and tokenizer is None:
            raise UnsupportedError(
                f"generate: stop_strings is {self._stops!r}, but this model came without a tokenizer and its "
                "answers have no text; use eos_token_id or stopping_criteria"
            )
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        )

    def push(self, token_id: int) -> str:
        """Add a token; returns new text, possibly empty. Sets `stopped` when a stop string is complete."""
        if self._detokenizer is None or self.stopped:
            return ""
        return self._release(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The end of the answer: returns what was still held back."""
        if self._detokenizer is None or self.stopped:
            return ""
        delta = self._release(self._detokenizer.finish())
        if not self.stopped:
            delta += self._held
            self.text += self._held
            self._held = ""
        return delta

    def _release(self, piece: str) -> str:
        pending = self._held + piece
        found = [at for stop in self._stops if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            delta, self._held = pending[: min(found)], ""
        else:
            keep = self._longest_overlap(pending)
            delta, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += delta
        return delta

    def _longest_overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
