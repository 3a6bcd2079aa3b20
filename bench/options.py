"""What to measure, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import ValueOutOfRangeError

DTYPES = {
    "auto": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
}
_MAX_THREADS = 1024  # the engine's own limit
SPARE = 8  # cache places beside depth and steps: warm-up steps


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    prompt: tokens of the prompt, 0 = no prompt cases. steps: decode steps timed per case, spread over the
    rounds, 0 = no decode cases. depth: tokens in the cache before decoding. skips: numbers of layers, "all" =
    every number, "quarters" = 0, 1/4, 1/2, 3/4 and all of the routed ones. shares: of the routed layers that
    prompt tokens skip, 0 to 1. threads: None = all available. rounds: turns through all cases. prefer_hub: see
    `open_checkpoint`.

    Raises:
        ValueOutOfRangeError: a value that cannot be measured; what depends on the model is for `check_fits`.
    """

    model: str
    dtype: str
    prompt: int
    steps: int
    depth: int
    skips: Sequence[int] | str
    shares: Sequence[float]
    threads: Sequence[int] | None
    rounds: int
    peers: bool
    accuracy: bool
    prefer_hub: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt", "steps", "depth"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("rounds", self.rounds, self.rounds >= 1, "1 or more")
        if not self.prompt and not self.steps:
            raise ValueOutOfRangeError(
                "bench: prompt and steps (-p, -n) are 0; that leaves nothing to measure; raise one of them"
            )
        _check(
            "steps",
            self.steps,
            self.steps == 0 or self.steps >= self.rounds,
            f"0, or {self.rounds} or more: one in each of {self.rounds} rounds",
        )
        percent = [round(share * 100, 6) for share in self.shares]
        _check("shares", percent, all(0 <= p <= 100 for p in percent), "per cents from 0 to 100")
        threads = [1] if self.threads is None else list(self.threads)
        fits = bool(threads) and all(1 <= n <= _MAX_THREADS for n in threads)
        _check("threads", threads, fits, f"numbers from 1 to {_MAX_THREADS}")
        if isinstance(self.skips, str):
            known = self.skips in ("all", "quarters")
            _check("skip", self.skips, known, "numbers, 'all' or 'quarters'")
        else:
            _check("skip", list(self.skips), all(n >= 0 for n in self.skips), "numbers from 0 on")
        _check("dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        if self.peers and self.steps:
            _check("depth", self.depth, self.depth > 0, "1 or more: peers need a token to begin at")

    def check_fits(self, config: FlexiDepthConfig) -> list[int]:
        """The numbers of layers to skip; ValueOutOfRangeError where the model has too few layers or positions."""
        limit = config.max_position_embeddings
        _check("prompt", self.prompt, self.prompt <= limit, f"0 to {limit}, the model's positions")
        needed = self.depth + self.steps + SPARE
        if self.steps and needed > limit:
            raise ValueOutOfRangeError(
                f"bench: depth {self.depth} and {self.steps} steps need {needed} positions; this model has "
                f"{limit}; lower -d or -n"
            )
        return resolve_skips(self.skips, config.num_routed_layers)


def resolve_skips(skips: Sequence[int] | str, num_routed: int) -> list[int]:
    """The numbers of skipped layers that `skips` of BenchOptions means for a model."""
    if skips == "all":
        return list(range(num_routed + 1))
    if isinstance(skips, str):
        return sorted({round(num_routed * quarter / 4) for quarter in range(5)})
    if wrong := [n for n in skips if not 0 <= n <= num_routed]:
        raise ValueOutOfRangeError(
            f"bench: cannot skip {wrong} layers; this model routes {num_routed}; wanted 0 to {num_routed}"
        )
    return list(skips)


def _check(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueOutOfRangeError(f"bench: {name} is {value!r}; wanted {wanted}")
