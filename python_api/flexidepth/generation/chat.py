"""A conversation that keeps its history and its cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .inputs import Message
from .output import GenerationOutput

if TYPE_CHECKING:
    from ..llm import FlexiDepth, StreamChunk


class Chat:
    """Turns of user and assistant. Each turn computes only what the cache does not hold yet.

    Args:
        llm: the model.
        system: optional system message.
        arguments: defaults for every turn's generation.
    """

    def __init__(self, llm: FlexiDepth, system: str | None = None, **arguments: Any) -> None:
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
        conversation = [*self.messages, {"role": "user", "content": text}]
        out = self.llm.generate(conversation, cache=self.cache, **{**self.arguments, **arguments})
        assert isinstance(out, GenerationOutput)
        self.messages = [*conversation, {"role": "assistant", "content": out.text}]
        return out

    def stream(self, text: str, **arguments: Any) -> Iterator[StreamChunk]:
        """One turn as a stream. An answer that is broken off stays in the history as far as it came."""
        conversation = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            for chunk in self.llm.stream(
                conversation, cache=self.cache, **{**self.arguments, **arguments}
            ):
                answer += chunk.text
                yield chunk
        finally:
            self.messages = [*conversation, {"role": "assistant", "content": answer}]
