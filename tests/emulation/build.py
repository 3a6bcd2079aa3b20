"""Builds the module _emulated out of csrc/cuda, once for each state of the sources."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from filelock import FileLock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def build(folder: Path, *, sanitize: str = "") -> Path:
    """Configure and build in `folder`; what is up to date is kept. Other processes wait for this one.
    Returns the module's path."""
    import pybind11

    scripts = sysconfig.get_path("scripts")
    cmake, ninja = (shutil.which(n, path=scripts) or shutil.which(n) for n in ("cmake", "ninja"))
    assert cmake is not None and ninja is not None, "cmake and ninja belong to the extra 'test'"
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FLEXIDEPTH_SANITIZE": sanitize,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        _run([cmake, "-S", str(HERE), "-B", str(folder), "-G", "Ninja", *defines])
        _run([cmake, "--build", str(folder)])
    (module,) = folder.glob("_emulated*.so")
    return module


def build_folder(name: str) -> Path:
    """Where a build is kept between runs."""
    return ROOT / "build" / f"{name}-{sys.implementation.cache_tag}"


def load(path: Path) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
