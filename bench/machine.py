"""The machine, named in every result."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flexidepth_ext import _C

_PACKAGES = (
    *("flexidepth", "torch", "transformers", "numpy", "llama-cpp-python"),
    *("openvino-genai", "onnxruntime-genai", "ctranslate2"),
)


def describe_machine() -> dict[str, Any]:
    """CPU, cores, caches, memory, system, versions and commit as plain values."""
    info = _cpuinfo()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "usable_threads": _C.available_threads(),
        "cache": info.get("cache size", ""),
        "isa_flags": [
            f
            for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
            if f in info.get("flags", "").split()
        ],
        "memory_gb": _memory_gb(),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": sys.version.split()[0],
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in lines)
        if value
    }


def _memory_gb() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0


def _gpu() -> str:
    """Name, memory, and the CUDA of torch; nothing where torch finds no device."""
    import torch

    if not torch.cuda.is_available():
        return ""
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Of the sources that run, with -dirty where they were changed since; of the build where git knows none."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside somebody else's repository.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name):
        return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*")
    return str(_C.build_info()["commit"]) or "not known"


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; nothing where it fails or is not installed."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
