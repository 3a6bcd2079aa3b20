"""What a prompt may be, brought to lists of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..arguments import as_whole
from ..errors import ShapeError, UnsupportedError, ValueOutOfRangeError

Message = dict[str, str]
Prompt = str | Sequence[int] | Sequence[Message]

_WANTED = "a text, a list of token ids or a list of chat messages"


def is_batch(prompt: Any) -> bool:
    """True for a list of prompts, False for one prompt."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence) or not prompt:
        return False
    first = prompt[0]
    return isinstance(first, Sequence) or getattr(first, "ndim", 0) > 0


def to_ids(prompt: Prompt, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """Token ids of a text, of a list, tensor or array [T] of ids, or of a list of chat messages.

    A text is tokenised as the tokenizer does it for the model (its own BOS, if it adds one); messages go
    through the chat template, which writes its own special tokens, so none are added.

    Raises:
        ValueOutOfRangeError: anything else, an empty prompt or an id outside the vocabulary.
        ShapeError: a tensor or array that is not one-dimensional.
        UnsupportedError: text without a tokenizer, messages without a chat template.
    """
    if isinstance(prompt, str):
        ids = list(_need(tokenizer, "a text").encode(prompt))
    elif isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
        ids = chat_ids(list(prompt), tokenizer)  # type: ignore[arg-type]
    else:
        ids = _listed(prompt)
    if not ids:
        raise ValueOutOfRangeError("generate: the prompt is empty; give at least one token")
    for at, value in enumerate(ids):
        token = as_whole(value)
        if token is None or not 0 <= token < vocab_size:
            raise ValueOutOfRangeError(
                f"generate: token id {value!r} at position {at}; the vocabulary is 0..{vocab_size - 1}"
            )
        ids[at] = token
    return ids


def _listed(prompt: Any) -> list[Any]:
    """The elements of a prompt that is neither a text nor messages."""
    if isinstance(prompt, (Tensor, np.ndarray)):
        if prompt.ndim != 1:
            raise ShapeError(
                f"generate: the prompt is a {type(prompt).__name__} {list(prompt.shape)}; wanted one dimension "
                "of token ids; give prompt[0] for its first row, list(prompt) for all of them"
            )
        return list(prompt.tolist())
    if isinstance(prompt, Mapping):
        way_out = "['input_ids'] of it" if "input_ids" in prompt else "[message], a list"
        raise ValueOutOfRangeError(
            f"generate: the prompt is {type(prompt).__name__} {prompt!r}; wanted {_WANTED}; give {way_out}"
        )
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise ValueOutOfRangeError(
            f"generate: the prompt is {prompt!r}; wanted {_WANTED}, or a list of these"
        )
    return list(prompt)


def chat_ids(messages: list[Message], tokenizer: Any | None) -> list[int]:
    """Ids of a conversation by the tokenizer's chat template, ready for the assistant's answer."""
    if getattr(_need(tokenizer, "chat messages"), "chat_template", None) is None:
        raise UnsupportedError(
            "chat: this tokenizer has no chat template; pass a plain text prompt or set tokenizer.chat_template"
        )
    for message in messages:
        texts = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not texts:
            raise ValueOutOfRangeError(
                f"chat: message {message!r}; wanted {{'role': ..., 'content': ...}}, both of them texts"
            )
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[union-attr]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]


def _need(tokenizer: Any | None, what: str) -> Any:
    if tokenizer is None:
        raise UnsupportedError(
            f"generate: {what} was given, but this model came without a tokenizer; pass token ids"
        )
    return tokenizer
