"""What the system tells about the processor and how much of it this process may use."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cpu_model() -> str:
    """Name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Feature flags of the processor as Linux spells them; empty where they cannot be read."""
    return set(_cpuinfo("flags").split())


def usable_cpus() -> int:
    """CPUs that affinity mask and cgroup quota leave to this process; at least 1."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = cgroup_cpu_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cgroup_cpu_quota(root: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs the cgroup quota allows (may be a fraction), or None without a quota.

    The tightest limit from this process's group up to the root counts (version 2), or that of the mounted cpu
    controller (version 1).
    """
    limits = []
    for folder in _own_groups(root, own):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            limits.append(int(words[0]) / int(words[1]))
    quota, period = _read(root / "cpu/cpu.cfs_quota_us"), _read(root / "cpu/cpu.cfs_period_us")
    if quota and period and int(quota) > 0:
        limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _own_groups(root: Path, own: Path) -> list[Path]:
    group = next((line[3:] for line in _read(own).splitlines() if line.startswith("0::")), "/")
    folder = root / group.strip("/")
    return [folder, *(parent for parent in folder.parents if root in (parent, *parent.parents))]


def _cpuinfo(key: str) -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
