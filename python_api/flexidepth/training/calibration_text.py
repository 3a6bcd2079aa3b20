"""Held-out text out of a file, as the token sequences that a calibration runs over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, ValueOutOfRangeError

_WANTED = 'wanted an object with "text" or "messages"'


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """{"text": ...} or {"messages": [...]} of each document: a line of a .jsonl file, or a whole .txt file.

    Raises:
        ValueOutOfRangeError: another kind of file, or a line that is no such object.
    """
    if path.suffix == ".txt":
        yield {"text": path.read_text(encoding="utf-8")}
        return
    if path.suffix != ".jsonl":
        raise ValueOutOfRangeError(f"{path}: {path.suffix or 'no ending'}; wanted .jsonl or .txt")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueOutOfRangeError(
                    f"{path}: line {number} is no JSON ({error}); {_WANTED}"
                ) from error
            known = isinstance(document, dict) and (
                isinstance(document.get("text"), str) or isinstance(document.get("messages"), list)
            )
            if not known:
                raise ValueOutOfRangeError(
                    f"{path}: line {number} is {line.strip()[:60]}; {_WANTED}"
                )
            yield document


def token_sequences(
    documents: Iterable[dict[str, Any]], tokenizer: Any | None, *, tokens: int, length: int
) -> list[list[int]]:
    """Ids of the documents from the first on, `length` each at most, until there are `tokens`.

    A longer document is cut into several sequences; conversations go through the chat template.
    """
    if tokenizer is None:
        raise UnsupportedError(
            "calibrate: this model came without a tokenizer, so text means nothing to it"
        )
    sequences: list[list[int]] = []
    left = tokens
    for document in documents:
        ids = _ids(document, tokenizer)
        for start in range(0, len(ids), length):
            if left <= 0:
                return sequences
            piece = ids[start : start + min(length, left)]
            sequences.append(piece)
            left -= len(piece)
    return sequences


def _ids(document: dict[str, Any], tokenizer: Any) -> list[int]:
    if "messages" not in document:
        # Not verbose: that a text is longer than the model's positions is no news, it is cut.
        return list(tokenizer(document["text"], verbose=False)["input_ids"])
    if getattr(tokenizer, "chat_template", None) is None:
        raise UnsupportedError(
            "calibrate: a document of messages, and this model's tokenizer has no chat template; give texts"
        )
    text = tokenizer.apply_chat_template(document["messages"], tokenize=False)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
