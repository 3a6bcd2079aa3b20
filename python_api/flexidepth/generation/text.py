"""From tokens to text as it streams: never half a character, never half a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


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
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._skip_special = skip_special_tokens
        self._ids: list[int] = []
        self._decoded = ""

    def push(self, token_id: int) -> str:
        """Add a token; returns new text, possibly empty. Sets `stopped` when a stop string is complete."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self._decoded += piece
        return self._release(piece)

    def finish(self) -> str:
        """The end of the answer: returns what was still held back."""
        if self._tokenizer is None or self.stopped:
            return ""
        # Bytes that never became a character decode to the replacement character, as in a plain decode.
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        delta = self._release(rest)
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
