"""A cache that outlives a call: tokens already computed are not computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexidepth_ext.engine import KVCache


class PromptCache:
    """Keys and values of a token sequence, with the tokens and the routing they were computed under.

    Made by `FlexiDepth.new_cache()` and given to `generate(..., cache=...)`, which keeps the longest prefix
    that the new prompt shares with it. A prefix computed under another routing is not reused.
    """

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self.token_ids: list[int] = []
        self.routing_key = ""

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.kv.length

    @property
    def nbytes(self) -> int:
        """Bytes of memory taken."""
        return self.kv.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self.kv.truncate(0)
        self.token_ids = []

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
