"""Held-out texts, cut into windows of tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, ValueOutOfRangeError
from ..training.calibration_text import TokenSequence
from ..training.documents import Document, read_documents
from ..training.tokenization import tokenize

_BETWEEN = "\n\n"  # documents
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class TextSet:
    """A set of held-out texts.

    windows: what is measured. calibration: windows of the text behind these, for finding thresholds; empty where the
    file is too short. prompts: first questions of its conversations. documents: its texts that are no conversations.
    """

    name: str
    windows: list[TokenSequence]
    calibration: list[TokenSequence]
    prompts: list[Messages]
    documents: list[str]

    @property
    def predictions(self) -> int:
        """Tokens whose prediction counts: all but the first of each window, of conversations the answers."""
        return sum(sum(window.counted[1:]) for window in self.windows)


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

    Of conversations what the assistant says counts, as in calibration: a model that answers is given the questions
    and the template's own tokens, it never says them. Where a tokenizer does not tell which tokens those are, all
    count.

    Documents are shuffled, since a file may hold one source behind another, and follow each other with an empty
    line between them, conversations as the chat template writes them. They are cut into windows wherever one is
    full; a window begins with BOS where the tokenizer puts one before every text.

    Args:
        path: a file or a saved dataset, as training.documents.read_documents takes it.
        tokens: most tokens to measure. window: tokens of a window. calibration_tokens: most tokens of
            calibration. num_prompts: most conversations whose beginning, up to the first answer, is kept.
        seed: of the order.

    Raises:
        DataError: a line of another form, no document. ValueOutOfRangeError: no text of two tokens, or no answer in
            what is to be measured. UnsupportedError: conversations for a tokenizer without a chat template.
    """
    begin = _first_ids(tokenizer)
    ids: list[int] = []
    counted: list[bool] = []
    prompts: list[Messages] = []
    size = window - len(begin)
    wanted = _whole_windows(tokens, window, size) + _whole_windows(calibration_tokens, window, size)
    listed = list(read_documents(path))
    random.Random(seed).shuffle(listed)
    for document in listed:
        if len(ids) >= wanted and len(prompts) >= num_prompts:
            break
        if (prompt := _prompt_of(document)) and len(prompts) < num_prompts:
            prompts.append(prompt)
        if len(ids) < wanted:
            own = _tokens_of(document, tokenizer)
            ids += own.ids
            counted += own.counted
    windows = [
        TokenSequence(begin + ids[at : at + size], [True] * len(begin) + counted[at : at + size])
        for at in range(0, len(ids), size)
    ]
    measured, rest = _take(windows, tokens)
    if not measured:
        raise ValueOutOfRangeError(f"eval: {path}: no text of two tokens or more in it")
    documents = [document.text for document in listed if document.text is not None]
    made = TextSet(name, measured, beginning(rest, calibration_tokens), prompts, documents)
    if not made.predictions:
        raise ValueOutOfRangeError(
            f"eval: {path}: no answer of a conversation among its first {tokens} tokens; measure more of them"
        )
    return made


def _whole_windows(tokens: int, window: int, size: int) -> int:
    """Tokens of text behind the beginnings of the windows that `tokens` fill."""
    return -(-tokens // window) * size


def _take(
    windows: list[TokenSequence], tokens: int
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(windows of `tokens` tokens at most, the windows behind them); the last one is cut to fit."""
    taken: list[TokenSequence] = []
    for at, window in enumerate(windows):
        room = tokens - sum(len(own.ids) for own in taken)
        if room < 2:
            return taken, windows[at:]
        if len(window.ids) >= 2:
            taken.append(TokenSequence(window.ids[:room], window.counted[:room]))
    return taken, []


def beginning(windows: list[TokenSequence], tokens: int) -> list[TokenSequence]:
    """The first windows, `tokens` tokens at most."""
    return _take(windows, tokens)[0]


def _first_ids(tokenizer: Any) -> list[int]:
    """BOS, if the tokenizer puts it before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer.encode(""))[:1] == [bos] else []


def _tokens_of(document: Document, tokenizer: Any) -> TokenSequence:
    """A document as it follows others."""
    if document.messages is None:
        text = (document.text or "") + _BETWEEN
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        return TokenSequence(ids, [True] * len(ids))
    if getattr(tokenizer, "chat_template", None) is None:
        raise UnsupportedError(
            f"eval: {document.where} is a conversation, and this model's tokenizer has no chat template; give texts"
        )
    tokens, counted = tokenize(document, tokenizer, "answers" if tokenizer.is_fast else "all")
    return TokenSequence(tokens.tolist(), counted.tolist())


def _prompt_of(document: Document) -> Messages:
    """The messages of a conversation up to its first answer; none where that answers no question."""
    messages = [dict(message) for message in document.messages or ()]
    roles = [message["role"] for message in messages]
    prompt = messages[: roles.index("assistant")] if "assistant" in roles else messages
    return prompt if prompt and prompt[-1]["role"] == "user" else []
