"""What a prompt may be, brought to lists of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UnsupportedError, ValueOutOfRangeError

Message = dict[str, str]
Prompt = str | Sequence[int] | Sequence[Message]


def is_batch(prompt: Any) -> bool:
    """True for a list of prompts, False for one prompt."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return bool(prompt) and not isinstance(prompt[0], (int, dict))


def to_ids(prompt: Prompt, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """Token ids of a text, a list of ids, or a list of chat messages.

    A text is tokenised as the tokenizer does it for the model (its own BOS, if it adds one); messages go
    through the chat template, which writes its own special tokens, so none are added.

    Raises:
        ValueOutOfRangeError: an empty prompt or an id outside the vocabulary.
        UnsupportedError: text without a tokenizer, messages without a chat template.
    """
    if isinstance(prompt, str):
        ids = list(_need(tokenizer, "a text").encode(prompt))
    elif len(prompt) > 0 and isinstance(prompt[0], dict):
        ids = chat_ids(list(prompt), tokenizer)  # type: ignore[arg-type]
    else:
        ids = [int(i) for i in prompt]  # type: ignore[arg-type]
    if not ids:
        raise ValueOutOfRangeError("generate: the prompt is empty; give at least one token")
    for at, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueOutOfRangeError(
                f"generate: token id {token} at position {at}; the vocabulary is 0..{vocab_size - 1}"
            )
    return ids


def chat_ids(messages: list[Message], tokenizer: Any | None) -> list[int]:
    """Ids of a conversation by the tokenizer's chat template, ready for the assistant's answer."""
    if getattr(_need(tokenizer, "chat messages"), "chat_template", None) is None:
        raise UnsupportedError(
            "chat: this tokenizer has no chat template; pass a plain text prompt or set tokenizer.chat_template"
        )
    for message in messages:
        if not isinstance(message, dict) or {"role", "content"} - message.keys():
            raise ValueOutOfRangeError(
                f"chat: message {message!r}; wanted {{'role': ..., 'content': ...}}"
            )
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # type: ignore[union-attr]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[misc]


def _need(tokenizer: Any | None, what: str) -> Any:
    if tokenizer is None:
        raise UnsupportedError(
            f"generate: {what} was given, but this model came without a tokenizer; pass token ids"
        )
    return tokenizer
