"""Prompts that a model is to answer: what `read_documents` reads, without the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError
from .documents import Message, make_document
from .records import read_records, source_paths


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant. where: the place it was read from."""

    where: str
    messages: tuple[Message, ...]


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts in a file of the kinds that `read_documents` takes, at most `limit` of them.

    A {"prompt"} (a text or messages), {"question"} or {"text"} is what the user says; of "messages" and
    "conversations" the last turns of the assistant are taken away. Answers that are there are ignored.

    Raises:
        DataError: see `read_documents`; a conversation in which nobody asks anything; no prompt at all.
    """
    prompts = []
    for where, found in islice(read_records(source_paths(path)), limit):
        if isinstance(found, DataError):
            raise found
        prompts.append(Prompt(where, _question(found, where)))
    if not prompts:
        raise DataError(f"{path}: no prompt; the source is empty")
    return prompts


def _question(record: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    if "prompt" in record and not isinstance(record["prompt"], str):
        record = {"messages": record["prompt"]}
    elif "messages" not in record and "conversations" not in record:
        # Any answer will do: only the question is kept.
        record = {"answer": "-"} | {
            k: v for k, v in record.items() if k in ("prompt", "question", "text")
        }
    document = make_document(record, where)
    if document.messages is None:
        return ({"role": "user", "content": document.text or ""},)
    messages = list(document.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise DataError(f"{where}: nobody asks anything; wanted a last turn of the user")
    return tuple(messages)
