"""Held-out texts, cut into windows of tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, ValueOutOfRangeError
from ..training.documents import Document, read_documents

_BETWEEN = "\n\n"  # documents
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class TextSet:
    """A set of held-out texts.

    windows: what is measured, token ids. calibration: windows of the text behind these, for finding
    thresholds; empty where the file is too short. prompts: first questions of its conversations. documents: its
    texts that are no conversations.
    """

    name: str
    windows: list[list[int]]
    calibration: list[list[int]]
    prompts: list[Messages]
    documents: list[str]

    @property
    def predictions(self) -> int:
        """Tokens that are predicted: all but the first of each window."""
        return sum(len(window) - 1 for window in self.windows)


def read_text_set(
    name: str,
    path: Path,
    tokenizer: Any,
    *,
    tokens: int,
    window: int,
    calibration_tokens: int = 0,
    num_prompts: int = 0,
    seed: int = 0,
) -> TextSet:
    """Read as much of a file as is wanted.

    Documents are shuffled, since a file may hold one source behind another, and follow each other with an empty
    line between them, conversations as the chat template writes them. They are cut into windows wherever one is
    full; a window begins with BOS where the tokenizer puts one before every text.

    Args:
        path: a file or a saved dataset, as training.documents.read_documents takes it.
        tokens: most tokens to measure. window: tokens of a window. calibration_tokens: most tokens of
            calibration. num_prompts: most conversations whose beginning, up to the first answer, is kept.
        seed: of the order.

    Raises:
        DataError: a line of another form, no document. ValueOutOfRangeError: no text of two tokens.
        UnsupportedError: conversations for a tokenizer without a chat template.
    """
    begin = _first_ids(tokenizer)
    ids: list[int] = []
    prompts: list[Messages] = []
    size = window - len(begin)
    wanted = _whole_windows(tokens, window, size) + _whole_windows(calibration_tokens, window, size)
    listed = list(read_documents(path))
    random.Random(seed).shuffle(listed)
    for document in listed:
        if len(ids) >= wanted and len(prompts) >= num_prompts:
            break
        text, prompt = _text_of(document, tokenizer)
        if prompt and len(prompts) < num_prompts:
            prompts.append(prompt)
        if len(ids) < wanted:
            ids += tokenizer.encode(text, add_special_tokens=False)
    windows = [begin + ids[at : at + size] for at in range(0, len(ids), size)]
    measured, rest = _take(windows, tokens)
    if not measured:
        raise ValueOutOfRangeError(f"eval: {path}: no text of two tokens or more in it")
    documents = [document.text for document in listed if document.text is not None]
    return TextSet(name, measured, beginning(rest, calibration_tokens), prompts, documents)


def _whole_windows(tokens: int, window: int, size: int) -> int:
    """Tokens of text behind the beginnings of the windows that `tokens` fill."""
    return -(-tokens // window) * size


def _take(windows: list[list[int]], tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """(windows of `tokens` tokens at most, the windows behind them); the last one is cut to fit."""
    taken: list[list[int]] = []
    for at, window in enumerate(windows):
        room = tokens - sum(map(len, taken))
        if room < 2:
            return taken, windows[at:]
        if len(window) >= 2:
            taken.append(window[:room])
    return taken, []


def beginning(windows: list[list[int]], tokens: int) -> list[list[int]]:
    """The first windows, `tokens` tokens at most."""
    return _take(windows, tokens)[0]


def _first_ids(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer puts it before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer.encode(""))[:1] == [bos] else []


def _text_of(document: Document, tokenizer: Any) -> tuple[str, Messages]:
    """(the text of a document, its messages up to the first answer)."""
    if document.messages is None:
        return (document.text or "") + _BETWEEN, []
    if getattr(tokenizer, "chat_template", None) is None:
        raise UnsupportedError(
            f"eval: {document.where} is a conversation, and this model's tokenizer has no chat template; give texts"
        )
    messages = [dict(message) for message in document.messages]
    roles = [message["role"] for message in messages]
    prompt = messages[: roles.index("assistant")] if "assistant" in roles else messages
    asks = bool(prompt) and prompt[-1]["role"] == "user"
    return tokenizer.apply_chat_template(messages, tokenize=False), prompt if asks else []
