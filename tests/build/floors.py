"""Which floor of csrc/ may use what: the rules that tests/build/test_floors.py holds.

core <- ops <- {cpu, cuda} <- engine <- bindings
"""

from __future__ import annotations

import re
from pathlib import Path

FLOORS: dict[str, set[str]] = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "cpu": {"core", "ops", "cpu"},
    "cuda": {"core", "ops", "cuda"},
    "engine": {"core", "ops", "cpu", "cuda", "engine"},
    "bindings": {"core", "ops", "cpu", "cuda", "engine", "bindings"},
}
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".in"}
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
_TORCH = re.compile(r"^(torch|ATen|c10|caffe2)/")
_CUDA = re.compile(r"^(cuda|cublas|curand|cub/|nv/|cooperative_groups)")
_GENERATED = "build_config.h"


def violations(csrc: Path) -> list[str]:
    """One line for each include under `csrc` that breaks a rule."""
    found = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in SUFFIXES):
        place = path.relative_to(csrc)
        for header in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            if reason := _forbidden(place, header):
                found.append(f"{place} includes {header}: {reason}")
    return found


def _forbidden(place: Path, header: str) -> str | None:
    floor, other = place.parts[0], header.partition("/")[0]
    if floor not in FLOORS:
        return f"{floor}/ is not one of {', '.join(FLOORS)}"
    if other in FLOORS:
        return None if other in FLOORS[floor] else f"{floor} lies below or beside {other}"
    if _TORCH.match(header):
        return "the compiled code does not use torch"
    if header.startswith(("pybind11", "Python.h")) and floor != "bindings":
        return "Python belongs to bindings/"
    if header == _GENERATED and floor != "bindings":
        return "the build's configuration belongs to bindings/"
    if _CUDA.match(header) and not (
        floor == "cuda" or (floor == "engine" and "cuda" in place.name)
    ):
        return "CUDA belongs to cuda/ and to the CUDA files of engine/"
    return None
