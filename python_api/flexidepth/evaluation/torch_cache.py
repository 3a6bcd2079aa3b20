"""Keys and values of sequences of unlike lengths, for one forward pass of the trainable model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TorchCache:
    """Stands for an engine's cache: what each layer keeps of one sequence.

    keys, values: [heads, length, head_dim] of each layer; ran: bool [length] of each layer, whether a token ran it, []
    as long as no layer has told (those that keep all keys and values do without).
    """

    def __init__(self, layers: int, max_length: int) -> None:
        self.layers, self.max_length = layers, max_length
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.ran: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(part.nbytes for part in (*self.keys, *self.values))

    def copy_from(self, other: TorchCache) -> None:
        """Hold what `other` holds."""
        self._hold(other.keys, other.values, other.ran, other.length)

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        keys, values = ([part[:, :length] for part in kept] for kept in (self.keys, self.values))
        self._hold(keys, values, [part[:length] for part in self.ran], min(length, self.length))

    def release(self) -> None:
        """Forget everything and give the memory back."""
        self._hold([], [], [], 0)

    def _hold(
        self, keys: list[Tensor], values: list[Tensor], ran: list[Tensor], length: int
    ) -> None:
        # Lists of one's own: tensors are never written to, so that copies can share them.
        self.keys, self.values, self.ran = (
            list(kept) if length else [] for kept in (keys, values, ran)
        )
        self.length = length


class BatchCache:
    """What a forward pass takes for a cache: those of a batch, filled up on the left to one length.

    So the last held token of each stands before the first new one, and slots are as far apart as positions.

    Args:
        caches: of the sequences. counts: new tokens of each; a shorter one is filled up on the right.
    """

    def __init__(self, caches: Sequence[TorchCache], counts: Sequence[int]) -> None:
        self.caches, self.counts = caches, counts
        self.past = max(cache.length for cache in caches)
        self.tokens = max(counts)
        layers = caches[0].layers
        self._keys: list[list[Tensor]] = [[] for _ in range(layers)]
        self._values: list[list[Tensor]] = [[] for _ in range(layers)]
        self._ran: list[list[Tensor]] = [[] for _ in range(layers)]

    def get_seq_length(self) -> int:
        """Slots before the first new token."""
        return self.past

    def positions(self) -> Tensor:
        """int64 [batch, tokens]: of the new tokens, each in its own sequence."""
        begin = torch.tensor([cache.length for cache in self.caches])
        return begin[:, None] + torch.arange(self.tokens)

    def visible(self) -> Tensor:
        """bool [batch, 1, tokens, past + tokens]: slots that hold a token of the sequence."""
        slots = torch.arange(self.past + self.tokens)
        first = torch.tensor([self.past - cache.length for cache in self.caches])
        end = torch.tensor([self.past + count for count in self.counts])
        held = (slots >= first[:, None]) & (slots < end[:, None])
        return held[:, None, None].expand(-1, 1, self.tokens, -1)

    def update(self, k: Tensor, v: Tensor, layer: int, _: object = None) -> tuple[Tensor, Tensor]:
        """Add keys and values [batch, heads, tokens, head_dim] of the new tokens; all of them, as many slots."""
        both = []
        for new, name, grown in ((k, "keys", self._keys), (v, "values", self._values)):
            old = [
                kept[layer] if (kept := getattr(cache, name)) else new[0, :, :0]
                for cache in self.caches
            ]
            grown[layer] = [
                torch.cat([held, own[:, :count]], 1)
                for held, own, count in zip(old, new, self.counts, strict=True)
            ]
            both.append(self._joined(old, new))
        return both[0], both[1]

    def update_ran(self, run: Tensor, layer: int) -> Tensor:
        """Add which new tokens run a layer, bool [batch, tokens]; of all slots [batch, past + tokens]."""
        old = [
            cache.ran[layer] if cache.ran else torch.ones(cache.length, dtype=torch.bool)
            for cache in self.caches
        ]
        self._ran[layer] = [
            torch.cat([held, own[:count]])
            for held, own, count in zip(old, run, self.counts, strict=True)
        ]
        return self._joined([held[None, :, None] for held in old], run[:, None, :, None])[
            :, 0, :, 0
        ]

    def _joined(self, old: Sequence[Tensor], new: Tensor) -> Tensor:
        """[batch, heads, past + tokens, dim] of [heads, held, dim] each and [batch, heads, tokens, dim]."""
        batch, heads, tokens, dim = new.shape
        joined = new.new_zeros(batch, heads, self.past + tokens, dim)
        for row, held in zip(joined, old, strict=True):
            row[:, self.past - held.shape[1] : self.past] = held
        joined[:, :, self.past :] = new
        return joined

    def commit(self) -> None:
        """Hand the caches what the pass has added, once all of it is computed."""
        told = any(self._ran) or any(cache.ran for cache in self.caches)
        for layer, kept in enumerate(self._ran):
            if told and not kept:  # a layer that does not tell runs every token
                self.update_ran(torch.ones(len(self.caches), self.tokens, dtype=torch.bool), layer)
        for b, (cache, count) in enumerate(zip(self.caches, self.counts, strict=True)):
            cache.keys = [kept[b] for kept in self._keys]
            cache.values = [kept[b] for kept in self._values]
            cache.length += count
            cache.ran = [kept[b] for kept in self._ran] if told else []
