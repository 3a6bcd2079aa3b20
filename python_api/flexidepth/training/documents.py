"""Documents to train on: texts and conversations, in the forms that instruction data comes in."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .records import Found, Sources, read_records, source_paths

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_QUESTIONS = ("prompt", "question")
_ANSWERS = ("answer", "completion", "response")
_FORMS = (
    'wanted {"text": ...}, {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, '
    '...]} or {"prompt" or "question": ..., "answer", "completion" or "response": ...}'
)


@dataclass(frozen=True)
class Document:
    """A text, or a conversation: one of `text` and `messages` is None. where: the place it was read from."""

    where: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None

    def digest(self, seed: int = 0) -> bytes:
        """SHA-256 of what it says. Spaces do not count, nor where it stands.

        Documents that say the same have the same digest in every process and every run.
        """
        content = hashlib.sha256(f"{seed}\n".encode())
        if self.messages is None:
            content.update(_plain(self.text or ""))
        for message in self.messages or ():
            content.update(b"\0" + message["role"].encode() + b"\0" + _plain(message["content"]))
        return content.digest()

    def record(self) -> dict[str, Any]:
        """The document as a JSON line holds it."""
        if self.messages is None:
            return {"text": self.text}
        return {"messages": [dict(message) for message in self.messages]}


def _plain(text: str) -> bytes:
    return " ".join(text.split()).encode()


class Documents(Iterator[Document]):
    """What `read_documents` returns: an iterator that counts. num_read, num_skipped so far; first_skipped
    says what was wrong with the first one skipped, None where none was."""

    def __init__(self, records: Iterator[Found], names: str, skip_broken: bool) -> None:
        self.num_read = 0
        self.num_skipped = 0
        self.first_skipped: str | None = None
        self._records, self._names, self._skip_broken = records, names, skip_broken

    def __next__(self) -> Document:
        for where, found in self._records:
            try:
                if isinstance(found, DataError):
                    raise found
                document = make_document(found, where)
            except DataError as error:
                if not self._skip_broken:
                    raise
                self.num_skipped += 1
                self.first_skipped = self.first_skipped or str(error)
                continue
            self.num_read += 1
            return document
        if self.num_read == 0:
            broken = (
                f"; {self.num_skipped} broken ones were skipped, the first: {self.first_skipped}"
            )
            raise DataError(
                f"{self._names}: no document{broken if self.num_skipped else '; the source is empty'}"
            )
        raise StopIteration


def read_documents(sources: Sources, *, skip_broken: bool = False) -> Documents:
    """Read documents one at a time; no more than one (or one block of a text file) is in memory.

    Args:
        sources: one path or several. A .jsonl file has one object a line: {"text": ...}, {"messages":
            [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]} (ShareGPT), or a
            {"prompt" or "question": ...} with an {"answer", "completion" or "response": ...}, which becomes a
            conversation of one turn; other keys are ignored. A .txt file is cut at blank lines into documents
            of some 2,000 characters. A directory is one that datasets' save_to_disk wrote, with rows of the
            same forms.
        skip_broken: leave broken lines out and count them, instead of raising.

    Returns:
        An iterator of Document, with the counts `num_read` and `num_skipped`.

    Raises:
        DataError: at once for a source that is missing or of another kind; while reading, for a broken line
            (bad JSON, bad UTF-8, wrong form, empty), with file, line and reason; at the end, if there was no
            document at all.
        UnsupportedError: a saved dataset while `datasets` is not installed.
    """
    paths = source_paths(sources)
    return Documents(read_records(paths), ", ".join(map(str, paths)), skip_broken)


def make_document(record: Mapping[str, Any], where: str) -> Document:
    """The document in a JSON object or a row. Raises DataError that begins with `where`."""
    try:
        if "messages" in record:
            return Document(where, messages=_messages(record["messages"]))
        if "conversations" in record:
            return Document(where, messages=_sharegpt(record["conversations"]))
        if "text" in record:
            return Document(where, text=_text("text", record["text"]))
        return Document(where, messages=_question(record))
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is a {type(value).__name__}; wanted a text")
    if not value.strip():
        raise DataError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} has half a character, at {error.start}: a lone surrogate"
        ) from None
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"messages is {value!r:.80}; wanted a list of at least one")
    return tuple(_message(number, message) for number, message in enumerate(value))


def _message(number: int, message: Any) -> Message:
    name = f"message {number}"
    if not isinstance(message, Mapping):
        raise DataError(f"{name} is a {type(message).__name__}; wanted an object")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{name}: role is {role!r}; wanted one of {', '.join(ROLES)}")
    if role == "system" and content == "":  # says: no system prompt, not even the template's own
        return {"role": "system", "content": ""}
    return {"role": str(role), "content": _text(f"{name}: content", content)}


def _sharegpt(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"conversations is {value!r:.80}; wanted a list of at least one")
    turns = []
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping) or turn.get("from") not in _SHAREGPT_ROLES:
            name = turn.get("from") if isinstance(turn, Mapping) else turn
            raise DataError(
                f'conversations, turn {number}: "from" is {name!r:.80}; wanted one of '
                f"{', '.join(_SHAREGPT_ROLES)}"
            )
        turns.append({"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return _messages(turns)


def _question(record: Mapping[str, Any]) -> tuple[Message, ...]:
    question = next((key for key in _QUESTIONS if key in record), None)
    answer = next((key for key in _ANSWERS if record.get(key) is not None), None)
    if question is None:
        raise DataError(f"keys are {', '.join(map(str, record)) or 'none'}; {_FORMS}")
    if answer is None:
        raise DataError(
            f"{question} without an answer; {_FORMS}. `flexidepth distill-data` answers prompts"
        )
    return (
        {"role": "user", "content": _text(question, record[question])},
        {"role": "assistant", "content": _text(answer, record[answer])},
    )
