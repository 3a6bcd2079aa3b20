"""Keys and values of one sequence in device memory, grown page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import OutOfMemoryError, ShapeError, ValueOutOfRangeError

if TYPE_CHECKING:
    from .cuda_runtime import Runtime

PAGE_TOKENS = 256


class CudaKVCache:
    """Made by `CudaEngine.new_cache`.

    Pages hold 256 tokens of all layers; growing adds pages and moves nothing. `table` [pages], int64 on the device,
    has their addresses; kernels that are queued read it when they run. head_bytes: of a key of one head.
    """

    def __init__(self, runtime: Runtime, page_bytes: int, head_bytes: int, max_length: int) -> None:
        self._runtime, self._page_bytes, self._head_bytes = runtime, page_bytes, head_bytes
        self._max_length, self._length = max_length, 0
        self._pages: list[Tensor] = []
        with runtime.active():
            self.table = torch.zeros(
                -(-max_length // PAGE_TOKENS), dtype=torch.int64, device=runtime.device
            )

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def max_length(self) -> int:
        """Tokens it may hold."""
        return self._max_length

    @property
    def nbytes(self) -> int:
        """Bytes of device memory taken so far."""
        return len(self._pages) * self._page_bytes

    @property
    def pages(self) -> tuple[Tensor, ...]:
        """The pages, uint8 on the device, for tests."""
        return tuple(self._pages)

    @property
    def num_pages(self) -> int:
        """Pages that the tokens held reach into."""
        return -(-self._length // PAGE_TOKENS)

    def fits(self, runtime: Runtime, page_bytes: int) -> bool:
        """Whether an engine with pages of so many bytes on this device can read it."""
        return self._runtime is runtime and self._page_bytes == page_bytes

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all.

        Raises ValueOutOfRangeError beyond max_length, OutOfMemoryError where the device has no memory; what the
        cache holds stays as it was.
        """
        if tokens > self._max_length:
            raise ValueOutOfRangeError(
                f"cache: {tokens} tokens do not fit max_length {self._max_length}; make a larger cache"
            )
        missing = -(-tokens // PAGE_TOKENS) - len(self._pages)
        if missing <= 0:
            return
        made: list[Tensor] = []
        with torch.inference_mode(False), self._runtime.active():
            try:
                for _ in range(missing):
                    page = torch.empty(
                        self._page_bytes, dtype=torch.uint8, device=self._runtime.device
                    )
                    made.append(page)
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"cache: {missing} more pages of {self._page_bytes / 1e6:.1f} MB (256 tokens each) for {tokens} "
                    f"tokens; {self._runtime.free_bytes() / 1e9:.2f} GB of the device's memory are free; shorten the "
                    "prompt, lower max_new_tokens, release other caches or load a smaller dtype"
                ) from error
            first = len(self._pages)
            addresses = torch.tensor(
                [page.data_ptr() for page in made], dtype=torch.int64, device="cpu"
            )
            self.table[first : first + missing].copy_(addresses)
        self._pages += made

    def advance(self, tokens: int) -> None:
        """`tokens` more are there: their keys and values are queued."""
        assert self._length + tokens <= len(self._pages) * PAGE_TOKENS
        self._length += tokens

    def extend_with_zeros(self, tokens: int) -> None:
        """Fill an empty cache with `tokens` whose keys and values are 0, for benchmarks: nobody computed them."""
        assert self._length == 0
        self.reserve(tokens)
        with self._runtime.active():
            for page in self._pages:
                page.zero_()
        self._length = tokens

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens and give whole pages behind them back."""
        if not 0 <= length <= self._length:
            raise ValueOutOfRangeError(
                f"cache: truncate to {length}; it holds {self._length} tokens"
            )
        self._length = length
        # Work that is queued may still read them: the memory is the stream's, and goes to what comes later on it.
        del self._pages[self.num_pages :]

    def copy_from(self, other: CudaKVCache) -> None:
        """Become a copy of `other`, a cache of the same model."""
        if not other.fits(self._runtime, self._page_bytes):
            raise ShapeError("cache: the other one belongs to a model of another shape")
        self.truncate(0)
        self.reserve(other.length)
        with self._runtime.active():
            for own, theirs in zip(self._pages, other._pages, strict=False):
                own.copy_(theirs)
        self._length = other.length

    def release(self) -> None:
        """Forget everything and give the memory back."""
        self.truncate(0)

    def poison_unused(self) -> None:
        """Fill the slots behind length() with NaN, for tests."""
        with self._runtime.active():
            for number, page in enumerate(self._pages):
                used = max(0, min(PAGE_TOKENS, self._length - number * PAGE_TOKENS))
                page.view(-1, PAGE_TOKENS, self._head_bytes)[:, used:].fill_(255)
