"""Builds flexidepth_ext._C, and _cuda where CUDA is, with CMake. No torch is needed to build, and none is linked.

Environment variables: FLEXIDEPTH_CUDA (AUTO, ON, OFF), FLEXIDEPTH_CUDA_ARCHS, FLEXIDEPTH_WERROR (ON,
OFF), FLEXIDEPTH_SANITIZE (address,undefined); CMAKE_ARGS adds any other CMake option.
"""

from __future__ import annotations

import filecmp
import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Each is passed at every build: CMake's cache would otherwise keep the value of an earlier one.
OPTIONS = {
    "FLEXIDEPTH_CUDA": "AUTO",
    "FLEXIDEPTH_CUDA_ARCHS": "",
    "FLEXIDEPTH_WERROR": "OFF",
    "FLEXIDEPTH_SANITIZE": "",
}


class CMakeBuild(build_ext):
    """Runs CMake in a fixed folder, so that a second build compiles only what changed.

    Nothing in that folder depends on where the module is wanted or on pip's temporary build
    environment, whose path is another one each time.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure, build, and copy the module to where setuptools wants it."""
        folder = _build_folder()
        _drop_foreign_cache(folder)
        folder.mkdir(parents=True, exist_ok=True)
        cmake, ninja = _find_tool("cmake"), _find_tool("ninja")
        options = {name: os.environ.get(name, default) for name, default in OPTIONS.items()}
        options |= {
            "FLEXIDEPTH_VERSION": self.distribution.get_version(),
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": str(_copy_pybind11(folder) / "share" / "cmake" / "pybind11"),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        extra = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        _run([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines, *extra])
        _run([cmake, "--build", str(folder)])
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        _place(folder / "lib" / target.name, target)
        _place_cuda(folder, target)

    def copy_extensions_to_source(self) -> None:
        """For an editable installation; setuptools knows of the one module alone."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            _place_cuda(_build_folder(), Path(self.get_ext_fullpath(ext.name)).resolve())


class CleanBuild(build):
    """Starts without what an earlier build left: a module deleted since must not be shipped."""

    def run(self) -> None:
        """Build into an empty folder."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def _build_folder() -> Path:
    return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def _place_cuda(folder: Path, beside: Path) -> None:
    """Put _cuda beside _C, or take an older build's away, as CMake planned."""
    target = beside.with_name(beside.name.replace("_C", "_cuda", 1))
    if "FLEXIDEPTH_HAS_CUDA TRUE" in (folder / "plan.cmake").read_text(encoding="utf-8"):
        _place(folder / "lib" / target.name, target)
    else:
        target.unlink(missing_ok=True)


def _place(built: Path, target: Path) -> None:
    # A new file, not new contents: a process that has the old one mapped keeps running.
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(built, partial)
    partial.replace(target)


def _find_tool(name: str) -> str:
    """Path of a program: of the package this interpreter imports, else on PATH.

    The package comes first because PATH would lead to one CMake in pip's build environment and to
    another one outside of it, and a different CMake compiles everything anew.
    """
    try:
        package = import_module(name)
        folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", None)
    except ImportError:
        folder = None
    found = shutil.which(name, path=folder) if folder else None
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(
            f"setup.py: {name} was not found; install it (pip install {name}) and try again"
        )
    return found


def _run(command: list[str]) -> None:
    result = subprocess.run(command, check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"setup.py: building flexidepth_ext._C failed with exit code {result.returncode}; the reason "
            f"stands above. The command was: {shlex.join(command)}"
        )


def _drop_foreign_cache(folder: Path) -> None:
    """Remove a build folder that came here with a copied source tree: CMake would refuse it."""
    cache = folder / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(
        encoding="utf-8"
    ):
        print(f"setup.py: {folder} belongs to another source tree and is made anew", flush=True)
        shutil.rmtree(folder)


def _copy_pybind11(folder: Path) -> Path:
    """Mirror pybind11's headers into the build folder; unchanged files keep their time stamps."""
    import pybind11

    source, target = Path(pybind11.__file__).parent, folder / "pybind11"
    for part in ("include", "share"):
        for path in sorted((source / part).rglob("*")):
            copy = target / path.relative_to(source)
            if path.is_file() and not (copy.exists() and filecmp.cmp(path, copy, shallow=False)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    return target


BENCH_PACKAGES = [
    "flexidepth.bench",
    *(f"flexidepth.bench.{name}" for name in find_packages("bench")),
]

setup(
    packages=[*find_packages("python_api"), "flexidepth_ext", *BENCH_PACKAGES],
    # bench/ lies at the top because people run it from there; installed it is a part of flexidepth.
    package_dir={"": "python_api", "flexidepth_ext": "flexidepth_ext", "flexidepth.bench": "bench"},
    # What is shipped stands here and nowhere else: a stale manifest must not add to it.
    include_package_data=False,
    package_data={
        # Trained routings of models that the package knows by name, one directory each.
        "flexidepth": ["py.typed", "pretrained/*/*", "training/recipes/*.yaml"],
        "flexidepth_ext": ["py.typed", "*.pyi"],
        "flexidepth.bench.gpu": ["*.cu"],  # compiled where it runs
    },
    ext_modules=[Extension("flexidepth_ext._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
)
