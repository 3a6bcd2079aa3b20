"""Documents as token ids, with the tokens that are to be predicted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, UnsupportedError, ValueOutOfRangeError
from .documents import Document, Message

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

LOSS_ON = ("all", "answers")
IGNORED = -100
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_tokenizer(tokenizer: Any, loss_on: str) -> None:
    """Raise what `tokenize` would raise for any text and any chat, but before any is read.

    Raises:
        ValueOutOfRangeError: loss_on is neither "all" nor "answers".
        UnsupportedError: no tokenizer, one without an end token, or one that cannot tell where in a chat a
            token lies.
    """
    if loss_on not in LOSS_ON:
        raise ValueOutOfRangeError(
            f"data: loss_on is {loss_on!r}; wanted one of {', '.join(LOSS_ON)}"
        )
    if tokenizer is None:
        raise UnsupportedError("data: this model came without a tokenizer, so it cannot read text")
    if tokenizer.eos_token_id is None:
        raise UnsupportedError("data: this tokenizer has no end token; set tokenizer.eos_token")
    if loss_on == "answers" and not tokenizer.is_fast:
        raise UnsupportedError(
            f"data: {type(tokenizer).__name__} does not tell where its tokens lie, so answers cannot be found; "
            'use a tokenizer of the tokenizers library, or loss_on="all"'
        )


def tokenize(document: Document, tokenizer: Any, loss_on: str = "all") -> tuple[Ids, Mask]:
    """Token ids int32 [T] and which of them are to be predicted, bool [T].

    A text gets the tokenizer's own special tokens and an end token; all of it is predicted. A conversation goes
    through the chat template; with loss_on "answers" only what the assistant says is predicted, up to and with
    its end token. Whether the first token is predicted is for the packing to say (it never is).

    Raises:
        DataError: a conversation that the chat template refuses. UnsupportedError: no chat template, or one that
            rewrites earlier turns.
    """
    if document.messages is None:
        # verbose=False: that a text is longer than the model's positions does not matter, it is cut.
        ids = tokenizer(document.text, add_special_tokens=True, verbose=False)["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        return np.array(ids, np.int32), np.ones(len(ids), np.bool_)
    if getattr(tokenizer, "chat_template", None) is None:
        raise UnsupportedError(
            f"{document.where}: a conversation, but this tokenizer has no chat template; set "
            "tokenizer.chat_template or give plain texts"
        )
    try:
        return _tokenize_chat(list(document.messages), tokenizer, loss_on)
    except UnsupportedError as error:
        raise UnsupportedError(f"{document.where}: {error}") from error
    except Exception as error:  # whatever a template raises: jinja2's errors, TypeError, ...
        raise DataError(
            f"{document.where}: the chat template refuses it: {type(error).__name__}: {error}"
        ) from error


def _tokenize_chat(messages: list[Message], tokenizer: Any, loss_on: str) -> tuple[Ids, Mask]:
    if loss_on == "answers" and _GENERATION.search(str(tokenizer.chat_template)):
        both = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return (
            np.array(both["input_ids"], np.int32),
            np.array(both["assistant_masks"], np.int32).astype(np.bool_),
        )
    text = _render(messages, tokenizer)
    if loss_on == "all":
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(ids, np.int32), np.ones(len(ids), np.bool_)
    both = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(both["input_ids"], np.int32)
    starts = np.array([start for start, _ in both["offset_mapping"]], np.int64)
    answers = np.zeros(len(ids), np.bool_)
    for begin, end in _answer_spans(messages, text, tokenizer):
        answers |= _up_to_end_token((starts >= begin) & (starts < end), ids, tokenizer)
    return ids, answers


def _render(messages: list[Message], tokenizer: Any, *, prompt: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )
    return text


def _answer_spans(messages: list[Message], text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where in the text each assistant turn lies, from behind the prompt for it to the end of the turn.

    Found by rendering the conversation up to each turn: so it holds for every template under which a longer
    conversation begins with the shorter one.
    """
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:number], tokenizer, prompt=True) if number else ""
        through = _render(messages[: number + 1], tokenizer)
        if not (text.startswith(before) and text.startswith(through)):
            raise UnsupportedError(
                "this chat template writes a turn otherwise when others follow, so its answers cannot be found; "
                'mark them in the template with {% generation %}, give one turn a line, or loss_on="all"'
            )
        spans.append((len(before), len(through)))
    return spans


def _up_to_end_token(span: Mask, ids: Ids, tokenizer: Any) -> Mask:
    """The span without what the template writes behind the last end token in it: the model never says that."""
    ends = np.flatnonzero(span & (ids == tokenizer.eos_token_id))
    if len(ends):
        span[ends[-1] + 1 :] = False
    return span


def tokenizer_identity(tokenizer: Any) -> Sequence[str]:
    """What decides which ids come out: the same for the same tokenizer in every process.

    The object itself will not do: padding and truncation of an earlier call are a part of its state.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
        vocabulary = json.dumps(state, sort_keys=True)
    else:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return (
        type(tokenizer).__name__,
        vocabulary,
        str(tokenizer.chat_template),
        json.dumps({key: str(value) for key, value in tokenizer.special_tokens_map.items()}),
        str((tokenizer.eos_token_id, tokenizer.bos_token_id)),
    )
