"""How busy the machine is with other programs while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IDLE = (3, 4)  # columns of /proc/stat's first line: idle, iowait


class OtherPrograms:
    """Counts processors that programs other than this one and its children use, from now on."""

    def __init__(self) -> None:
        self._begin = _now()

    def cores(self) -> float | None:
        """In the mean since the beginning; None where the system does not say, or too little time has passed."""
        end = _now()
        if self._begin is None or end is None:
            return None
        seconds, busy, own = (b - a for a, b in zip(self._begin, end, strict=True))
        # The counters tick every hundredth of a second.
        return max(0.0, (busy - own) / seconds) if seconds > 0.1 else None


def _now() -> tuple[float, float, float] | None:
    """(time, processor seconds of the whole machine, those of this process and its ended children)."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
        ticks = [int(word) for word in first.split()[1:9]]
        hertz = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    busy = (sum(ticks) - sum(ticks[i] for i in _IDLE)) / hertz
    own = os.times()
    return (
        time.perf_counter(),
        busy,
        own.user + own.system + own.children_user + own.children_system,
    )


def load_average() -> float:
    """One-minute load of the machine; nan where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return float("nan")
