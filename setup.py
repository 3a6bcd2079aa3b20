"""Builds flexidepth_ext._C with CMake. No torch is needed to build, and none is linked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake in a fixed folder, so that a second build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFLEXIDEPTH_VERSION={self.distribution.get_version()}",
            f"-DFLEXIDEPTH_CUDA={os.environ.get('FLEXIDEPTH_CUDA', 'AUTO')}",
            "-DCMAKE_BUILD_TYPE=" + ("Debug" if self.debug else "Release"),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        self._run(configure)
        self._run(["cmake", "--build", str(build)])

    def _run(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise SystemExit(f"{command[0]} was not found; install it (pip install cmake ninja) and try again") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"building flexidepth_ext._C failed ({' '.join(command)}); see the output above") from error


setup(ext_modules=[Extension("flexidepth_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
