"""The time that a whole check may take: every part of it gets no more than what is left."""

from __future__ import annotations

import math
import time

_LEAST = 3.0  # seconds with which nothing is worth beginning


class Deadline:
    """Begins where it is made; without a number there is no end."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether nothing is to be begun any more."""
        return self.left < _LEAST

    @property
    def said(self) -> str:
        """Why something is left out."""
        return f"left out: nothing is left of the {self.seconds:.0f} s of --deadline"

    def cut(self, seconds: float) -> float:
        """So many seconds, or what is left."""
        return min(seconds, self.left)
