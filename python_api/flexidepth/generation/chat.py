"""A conversation that keeps its history and its cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ValueOutOfRangeError
from .inputs import Message
from .output import GenerationOutput
from .skipping import with_defaults

if TYPE_CHECKING:
    from ..llm import FlexiDepth, StreamChunk


class Chat:
    """Turns of user and assistant. Each turn computes only what the cache does not hold yet.

    A turn that fails leaves `messages` as they were. An answer that is broken off, by Ctrl-C or by closing its
    stream, stays as far as it came; when nothing had come yet, there was no turn.

    Args:
        llm: the model.
        system: optional system message.
        arguments: defaults for every turn's generation.
    """

    def __init__(self, llm: FlexiDepth, system: str | None = None, **arguments: Any) -> None:
        if system is not None:
            _check_text("the system message", system)
        self.llm = llm
        self.arguments = arguments
        self.cache = llm.new_cache()
        self._system: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages: list[Message] = list(self._system)

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = list(self._system)
        self.cache.clear()

    def send(self, text: str, **arguments: Any) -> GenerationOutput:
        """One turn; returns the whole answer."""
        conversation = self._asked(text)
        out = self.llm.generate(
            conversation, cache=self.cache, **with_defaults(self.arguments, arguments)
        )
        assert isinstance(out, GenerationOutput)
        self._answered(conversation, out.text)
        return out

    def stream(self, text: str, **arguments: Any) -> Iterator[StreamChunk]:
        """One turn as a stream."""
        conversation, answer, over = self._asked(text), "", False
        try:
            for chunk in self.llm.stream(
                conversation, cache=self.cache, **with_defaults(self.arguments, arguments)
            ):
                answer += chunk.text
                over = chunk.finish_reason is not None
                yield chunk
        except (GeneratorExit, KeyboardInterrupt):
            if answer or over:
                self._answered(conversation, answer)
            raise
        self._answered(conversation, answer)

    def _asked(self, text: str) -> list[Message]:
        _check_text("the turn", text)
        return [*self.messages, {"role": "user", "content": text}]

    def _answered(self, conversation: list[Message], answer: str) -> None:
        self.messages = [*conversation, {"role": "assistant", "content": answer}]


def _check_text(what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueOutOfRangeError(
            f"chat: {what} is {text!r}; wanted a text; give the content alone, the role goes without saying"
        )
