"""A cache that outlives a call: tokens already computed are not computed again."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from ..errors import ValueOutOfRangeError

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine, KVCache


class PromptCache:
    """Keys and values of a token sequence, with the tokens and the routing they were computed under.

    Made by `FlexiDepth.new_cache()` and given to `generate(..., cache=...)` of the same model, which keeps
    the longest prefix that the new prompt shares with it. A prefix computed under another routing, other
    thresholds included, is not reused.
    """

    def __init__(self, kv: KVCache, engine: Engine) -> None:
        self.kv = kv
        self.token_ids: list[int] = []
        self.routing_key = ""
        # Weak: a cache that is still around keeps no weights in memory.
        self._engine = weakref.ref(engine)

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.kv.length

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken."""
        return self.kv.nbytes

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self.kv.truncate(0)
        self.token_ids = []

    def belongs_to(self, engine: Engine) -> bool:
        """Whether this engine made the cache: another one would misread its contents."""
        return self._engine() is engine

    def keep_prefix(self, prompt: list[int], routing_key: str) -> int:
        """Cut back to the longest prefix shared with `prompt`; returns its length.

        At least the last prompt token is left to compute, because its logits are needed.
        """
        shared = 0
        if routing_key == self.routing_key:
            limit = min(len(prompt) - 1, len(self.token_ids), self.kv.length)
            while shared < limit and prompt[shared] == self.token_ids[shared]:
                shared += 1
        self.kv.truncate(shared)
        self.token_ids = self.token_ids[:shared]
        self.routing_key = routing_key
        return shared


def check_cache(cache: Any, engine: Engine, num_answers: int) -> None:
    """Raise ValueOutOfRangeError unless `cache` was made for this engine and there is one answer to compute."""
    if not isinstance(cache, PromptCache):
        raise ValueOutOfRangeError(f"generate: cache is {cache!r}; wanted one made by new_cache()")
    if not cache.belongs_to(engine):
        raise ValueOutOfRangeError(
            f"generate: the cache (with {cache.length} tokens) was made by another model, whose keys and values "
            "mean nothing to this one; make one with this model's new_cache()"
        )
    if num_answers != 1:
        raise ValueOutOfRangeError(
            f"generate: a cache holds one sequence, {num_answers} were asked for; give one prompt and one "
            "answer with it"
        )
