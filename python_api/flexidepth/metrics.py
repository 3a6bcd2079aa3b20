"""Times and memory of one generation."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Metrics:
    """Figures of one generated sequence. Times in seconds; rates in tokens a second, never mixed.

    prompt_tokens: tokens of the prompt; cached_tokens: those of them found in the cache. ttft_s: time to the
    first token. decode_s: time from the first to the last token. mean_layers_used: over decoded tokens.
    peak_memory_bytes: largest resident size of the process so far (VmHWM or ru_maxrss).
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prefill_s: float
    decode_s: float
    ttft_s: float
    mean_layers_used: float
    peak_memory_bytes: int

    @property
    def prefill_tps(self) -> float:
        """Prompt tokens computed (not cached) per second."""
        return (
            (self.prompt_tokens - self.cached_tokens) / self.prefill_s
            if self.prefill_s > 0
            else 0.0
        )

    @property
    def decode_tps(self) -> float:
        """Tokens after the first per second."""
        return (
            (self.new_tokens - 1) / self.decode_s
            if self.decode_s > 0 and self.new_tokens > 1
            else 0.0
        )

    def to_dict(self) -> dict[str, float]:
        """All figures, rates included, as plain numbers."""
        return {**asdict(self), "prefill_tps": self.prefill_tps, "decode_tps": self.decode_tps}


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def available_memory_bytes() -> int | None:
    """Memory that a new allocation could have, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
