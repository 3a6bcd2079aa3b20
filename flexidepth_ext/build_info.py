"""What was built and what can run here: a report that needs neither `_C` nor torch to load.

report = collect()       plain values, ready for json.dumps
print(render(report))    the same for people
report["ok"]             False if the compiled module cannot be loaded
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from . import load_error, rebuild_command
from .cpu_info import cgroup_cpu_quota, cpu_flags, cpu_model, usable_cpus

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")

# What each kernel file needs of the processor, as Linux spells it: only for the report of a build that
# cannot be loaded; a build that can is asked itself.
_ISA_FLAGS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"},
}


def collect() -> dict[str, Any]:
    """Everything the report says, as plain values.

    Keys: ok; python; packages (name -> version or None); build (None where `_C` cannot be loaded);
    load_error; rebuild; cpu; threads; cuda.
    """
    error = load_error()
    return {
        "ok": error is None,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("flexidepth", *LIBRARIES)},
        "build": None if error else _build(),
        "load_error": None if error is None else f"{type(error).__name__}: {error}",
        "rebuild": rebuild_command(),
        "cpu": _cpu(loaded=error is None),
        "threads": _threads(loaded=error is None),
        "cuda": _cuda(loaded=error is None),
    }


def render(report: dict[str, Any]) -> str:
    """The report as aligned lines of text."""
    lines = _render_build(report)
    cpu, threads, cuda = report["cpu"], report["threads"], report["cuda"]
    kernels = ", ".join(cpu["runnable"])
    if cpu["chosen"]:
        kernels += f" (in use: {cpu['chosen']})"
    quota = "none" if threads["cgroup_quota"] is None else f"{threads['cgroup_quota']:g} CPUs"
    lines += [
        ("processor", cpu["model"]),
        ("runs kernels", kernels),
        (
            "threads",
            f"{threads['usable']} ({threads['logical']} logical CPUs, {threads['affinity']} in the "
            f"affinity mask, cgroup quota {quota})",
        ),
        ("CUDA", cuda["state"]),
        ("driver", cuda["driver"]),
        ("Python", f"{report['python']} at {report['executable']}"),
        ("platform", report["platform"]),
    ]
    lines += [(name, version or "not installed") for name, version in report["packages"].items()]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _render_build(report: dict[str, Any]) -> list[tuple[str, str]]:
    build = report["build"]
    if build is None:
        return [
            ("extension", f"CANNOT BE LOADED: {report['load_error']}"),
            ("way out", report["rebuild"]),
        ]
    commit = f", commit {build['commit']}" if build["commit"] else ""
    lines = [
        ("extension", f"flexidepth_ext._C {build['version']}{commit}: loads"),
        ("file", build["file"]),
        ("compiler", f"{build['compiler']}, {build['build_type']}: {build['flags']}"),
        ("kernels", f"{build['kernels']} ({build['architecture']})"),
    ]
    if build["sanitize"]:
        lines.append(("sanitizers", build["sanitize"]))
    return lines


def _build() -> dict[str, Any]:
    from . import _C

    return {**_C.build_info(), "file": _C.__file__}


def _cpu(*, loaded: bool) -> dict[str, Any]:
    flags = cpu_flags()
    chosen: str | None = None
    if loaded:
        from . import _C
        from .errors import FlexiDepthError

        runnable = list(_C.available_isas())
        try:
            chosen = _C.OpContext(1).isa
        except FlexiDepthError as error:  # FLEXIDEPTH_ISA asks for one that cannot run here
            chosen = f"none: {error}"
    else:
        runnable = ["generic", *(isa for isa, needed in _ISA_FLAGS.items() if needed <= flags)]
    return {
        "model": cpu_model(),
        "architecture": platform.machine(),
        "runnable": runnable,
        "chosen": chosen,
        "asked": os.environ.get("FLEXIDEPTH_ISA"),
    }


def _threads(*, loaded: bool) -> dict[str, Any]:
    if loaded:
        from . import _C

        usable = _C.available_threads()
    else:
        usable = usable_cpus()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "usable": usable,
        "logical": os.cpu_count(),
        "affinity": affinity,
        "cgroup_quota": cgroup_cpu_quota(),
    }


def _cuda(*, loaded: bool) -> dict[str, Any]:
    driver = _cuda_driver()
    if not loaded:
        return {"built": None, "state": "unknown: the extension cannot be loaded", "driver": driver}
    from . import _C

    info = _C.build_info()
    state = info["cuda_plan"]
    if info["cuda"]:
        from .cuda_device import cuda_module
        from .errors import UnsupportedError

        try:
            cuda_module()
        except UnsupportedError as error:
            state += f"; cannot be used: {str(error).removeprefix('cuda: ')}"
    return {"built": info["cuda"], "state": state, "driver": driver}


def _cuda_driver() -> str:
    """State of the NVIDIA driver, asked of the driver itself so that no toolkit is needed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 not found)"
    if code := driver.cuInit(0):
        return f"NVIDIA driver present, cuInit failed with code {code}"
    number, count = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDriverGetVersion(ctypes.byref(number))
    # A failing call leaves its argument untouched: any code but 0 means no devices.
    if driver.cuDeviceGetCount(ctypes.byref(count)):
        count.value = 0
    supported = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return f"NVIDIA driver for CUDA {supported}, {count.value} device(s)"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        # Importable without an installation, as from a source folder on PYTHONPATH.
        return "version unknown" if find_spec(name) else None
