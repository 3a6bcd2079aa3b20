"""What CMake plans: CUDA or not and why, and which flags each file is compiled with. Nothing is built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pybind11 = pytest.importorskip("pybind11", reason="needs the build tools of the extra 'test'")

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
NINJA = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
if CMAKE is None or NINJA is None:
    pytest.skip("needs cmake and ninja of the extra 'test'", allow_module_level=True)

# The plan alone, without a language, so that it can be asked in an instant.
PLAN_PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(plan LANGUAGES NONE)
set(CUDA_SOURCES ${SOURCES})
include(${CUDA_PLAN_FILE})
message(STATUS "plan: ${CUDA_PLAN}")
"""
ARCHS_PROJECT = """
cmake_minimum_required(VERSION 3.24)
project(archs LANGUAGES NONE)
set(FLEXIDEPTH_CUDA OFF)
include(${CUDA_PLAN_FILE})
flexidepth_cuda_archs(${NVCC_FAKE} archs)
message(STATUS "archs: ${archs}")
flexidepth_cuda_code("${archs}" code)
message(STATUS "code: ${code}")
"""


def _cmake(source: Path, build: Path, *defines: str) -> subprocess.CompletedProcess[str]:
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"]
    return subprocess.run(
        [str(CMAKE), "-S", str(source), "-B", str(build), *generator, *defines],
        capture_output=True,
        text=True,
        check=False,
    )


def _configure(build: Path, *defines: str) -> subprocess.CompletedProcess[str]:
    tools = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    return _cmake(ROOT, build, *tools, *defines)


def _plan(folder: Path, project: str, *defines: str) -> subprocess.CompletedProcess[str]:
    (folder / "CMakeLists.txt").write_text(project, encoding="utf-8")
    plan = f"-DCUDA_PLAN_FILE={ROOT / 'cmake' / 'CudaPlan.cmake'}"
    return _cmake(folder, folder / "build", plan, *defines)


def _words(text: str) -> str:
    return " ".join(text.split())


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{text}'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_cuda_off_is_a_cpu_build_that_says_so_and_has_the_right_flags(tmp_path: Path) -> None:
    result = _configure(tmp_path, "-DFLEXIDEPTH_CUDA=OFF")
    assert result.returncode == 0, result.stderr
    assert "CUDA plan: CPU build (FLEXIDEPTH_CUDA=OFF)" in result.stdout
    commands = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    flags = {Path(entry["file"]).name: entry["command"].split() for entry in commands}
    assert {"module.cpp", "kernels_generic.cpp", "engine.cpp", "arena.cpp"} <= flags.keys()
    for name, command in flags.items():
        assert "-ffp-contract=off" in command and "-O3" in command, name
        unwanted = {"-march=native", "-ffast-math", "-fopenmp", "-flto", "-flto=auto"}
        assert unwanted.isdisjoint(command), name
    wide = {name for name, command in flags.items() if any(f.startswith("-mavx") for f in command)}
    assert all(name.startswith("kernels_") and name != "kernels_generic.cpp" for name in wide)
    if "kernels_avx2.cpp" in flags:
        sets = ("avx2", "avx512", "avx512bf16", "amx")
        assert wide == {f"kernels_{name}.cpp" for name in sets}
        assert "-mavx512f" not in flags["kernels_avx2.cpp"]
        assert "-mavx512bf16" not in flags["kernels_avx512.cpp"]
        assert "-mavx512bf16" in flags["kernels_avx512bf16.cpp"]
        tiles = {name for name, command in flags.items() if "-mamx-tile" in command}
        assert tiles == {"kernels_amx.cpp"}


def test_warnings_and_sanitizers_are_options(tmp_path: Path) -> None:
    result = _configure(
        tmp_path, "-DFLEXIDEPTH_WERROR=ON", "-DFLEXIDEPTH_SANITIZE=address,undefined"
    )
    assert result.returncode == 0, result.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text(encoding="utf-8"))
    plain = [entry for entry in commands if not entry["file"].endswith(".cu")]
    assert plain
    for entry in plain:
        assert {"-Werror", "-fsanitize=address,undefined"} <= set(entry["command"].split())


def test_another_architecture_compiles_the_generic_kernels_alone(tmp_path: Path) -> None:
    toolchain = tmp_path / "toolchain.cmake"
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME Linux)\nset(CMAKE_SYSTEM_PROCESSOR aarch64)\n", encoding="utf-8"
    )
    result = _configure(tmp_path / "build", f"-DCMAKE_TOOLCHAIN_FILE={toolchain}")
    assert result.returncode == 0, result.stderr
    assert "CPU kernels: generic\n" in result.stdout
    text = (tmp_path / "build" / "compile_commands.json").read_text(encoding="utf-8")
    assert "kernels_generic.cpp" in text
    assert "kernels_avx" not in text and "FD_X86" not in text


def test_the_environment_variable_reaches_cmake_and_on_without_sources_fails(
    tmp_path: Path,
) -> None:
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "cmake", tmp_path / "cmake")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("*.cu"))
    (tmp_path / "python_api").mkdir()
    (tmp_path / "bench").mkdir()
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        env={**os.environ, "FLEXIDEPTH_CUDA": "ON"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "FLEXIDEPTH_CUDA=ON, but this version has no CUDA sources" in _words(result.stderr)
    assert "FLEXIDEPTH_CUDA=AUTO or OFF" in _words(result.stderr)
    assert "setup.py: building flexidepth_ext._C failed" in result.stderr


def test_an_unknown_choice_is_an_error(tmp_path: Path) -> None:
    result = _plan(tmp_path, PLAN_PROJECT, "-DFLEXIDEPTH_CUDA=MAYBE")
    assert result.returncode != 0
    assert "FLEXIDEPTH_CUDA is 'MAYBE'; wanted AUTO, ON or OFF" in _words(result.stderr)


def test_without_nvcc_on_is_an_error_that_names_it(tmp_path: Path) -> None:
    result = _plan(tmp_path, PLAN_PROJECT, "-DFLEXIDEPTH_CUDA=ON", "-DSOURCES=a.cu", "-DNVCC=")
    assert result.returncode != 0
    assert "FLEXIDEPTH_CUDA=ON, but nvcc not found" in _words(result.stderr)
    assert "CUDA_HOME" in result.stderr


@pytest.mark.parametrize(
    ("defines", "plan"),
    [
        (["-DSOURCES=a.cu", "-DNVCC="], "CPU build (nvcc not found; install"),
        (["-DNVCC="], "CPU build (no CUDA sources in this version; nvcc not found)"),
        (["-DNVCC=/x/nvcc"], "CPU build (no CUDA sources in this version; nvcc found at /x/nvcc)"),
    ],
)
def test_auto_falls_back_to_the_cpu_and_says_why(
    tmp_path: Path, defines: list[str], plan: str
) -> None:
    result = _plan(tmp_path, PLAN_PROJECT, "-DFLEXIDEPTH_CUDA=AUTO", *defines)
    assert result.returncode == 0, result.stderr
    assert f"plan: {plan}" in result.stdout


@pytest.mark.parametrize(
    ("release", "gpus", "asked", "archs"),
    [
        ("13.0", None, "", "80-real;86-real;89-real;90-real;100-real;120"),
        ("12.4", None, "", "80-real;86-real;89-real;90"),
        ("13.0", "9.0", "", "90"),
        ("13.0", "10.0\n9.0\n9.0", "", "90-real;100"),
        ("13.0", "9.0", "75", "75"),
    ],
)
def test_architectures_are_the_asked_then_the_local_then_the_common_ones(
    tmp_path: Path, release: str, gpus: str | None, asked: str, archs: str
) -> None:
    nvcc = _script(tmp_path / "nvcc", f"Cuda compilation tools, release {release}, V{release}.1")
    smi = "" if gpus is None else str(_script(tmp_path / "nvidia-smi", gpus))
    defines = [f"-DNVCC_FAKE={nvcc}", f"-DNVIDIA_SMI={smi}", f"-DFLEXIDEPTH_CUDA_ARCHS={asked}"]
    result = _plan(tmp_path, ARCHS_PROJECT, *defines)
    assert f"archs: {archs}\n" in result.stdout, result.stderr


def _code(family: int, *made: str) -> list[str]:
    return [f"-gencode=arch=compute_{family},code={name}" for name in made]


@pytest.mark.parametrize(
    ("archs", "code"),
    [
        (
            "80-real;89-real;90-real;120",
            [*_code(80, "sm_80", "sm_89"), *_code(90, "sm_90", "sm_120", "compute_90")],
        ),
        ("75", _code(75, "sm_75", "compute_75")),
        (
            "100a-real;90-virtual",
            ["-gencode=arch=compute_100a,code=sm_100a", *_code(90, "compute_90")],
        ),
    ],
)
def test_devices_of_a_family_share_a_translation(
    tmp_path: Path, archs: str, code: list[str]
) -> None:
    result = _plan(tmp_path, ARCHS_PROJECT, "-DNVCC_FAKE=nvcc", f"-DFLEXIDEPTH_CUDA_ARCHS={archs}")
    assert f"code: {';'.join(code)}\n" in result.stdout, result.stderr


def test_an_architecture_that_is_no_number_is_named(tmp_path: Path) -> None:
    result = _plan(tmp_path, ARCHS_PROJECT, "-DNVCC_FAKE=nvcc", "-DFLEXIDEPTH_CUDA_ARCHS=90;hopper")
    assert result.returncode != 0
    assert "has 'hopper'; wanted numbers as in 80-real;90" in " ".join(result.stderr.split())
