"""The order of the floors in csrc/, and what the kernels of one instruction set may leak to others."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .floors import violations

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles" / "_C.dir"


def test_every_include_points_down() -> None:
    assert violations(ROOT / "csrc") == []


@pytest.mark.parametrize(
    ("place", "header"),
    [
        ("core/a.h", "ops/linear.h"),
        ("ops/a.h", "cpu/thread_pool.h"),
        ("cpu/a.cpp", "engine/engine.h"),
        ("cpu/a.cpp", "cuda/launch.h"),
        ("cuda/a.cu", "cpu/simd.h"),
        ("engine/a.cpp", "bindings/register.h"),
        ("engine/a.cpp", "pybind11/pybind11.h"),
        ("engine/a.cpp", "cuda_runtime.h"),
        ("core/a.h", "build_config.h"),
        ("bindings/a.cpp", "torch/extension.h"),
        ("bindings/a.cpp", "ATen/ATen.h"),
        ("helpers/a.h", "vector"),
    ],
)
def test_an_include_that_points_up_is_found(tmp_path: Path, place: str, header: str) -> None:
    _write(tmp_path / place, f"#include <{header}>\n")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("place", "header"),
    [
        ("engine/cuda_engine.cpp", "cuda_runtime.h"),
        ("cuda/a.cu", "cuda_bf16.h"),
        ("bindings/a.cpp", "pybind11/pybind11.h"),
        ("engine/a.cpp", "ops/linear.h"),
    ],
)
def test_an_include_that_points_down_is_allowed(tmp_path: Path, place: str, header: str) -> None:
    _write(tmp_path / place, f"#include <{header}>\n")
    assert violations(tmp_path) == []


def test_the_extension_package_imports_nothing_of_the_package_above_it() -> None:
    upward = [
        f"{path.name}: {ast.unparse(node)}"
        for path in (ROOT / "flexidepth_ext").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any(name.split(".")[0] == "flexidepth" for name in _imported(node))
    ]
    assert upward == []


@pytest.mark.skipif(
    shutil.which("nm") is None or not OBJECTS.is_dir(), reason="needs nm and a build folder"
)
def test_kernel_files_define_nothing_the_linker_could_share() -> None:
    """A weak symbol compiled for AVX-512 could be the copy that every processor gets to run."""
    kernels = sorted((OBJECTS / "csrc" / "cpu").glob("kernels_*.cpp.o"))
    assert kernels
    for path in kernels:
        shared = [line for line in _symbols(path) if line.split()[1] in "WVu"]
        assert shared == [], f"{path.name} defines {shared}"


def _symbols(path: Path) -> list[str]:
    command = ["nm", "--defined-only", "--demangle", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if node.level == 0 else []


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
