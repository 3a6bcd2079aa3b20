"""The compiled CUDA module, and why it cannot be used here where it cannot."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import rebuild_command
from .errors import UnsupportedError

_DRIVER_MISSING_OR_OLD = 35  # cudaErrorInsufficientDriver
_NO_DEVICE = 100


def cuda_module() -> Any:
    """flexidepth_ext._cuda, with a device that it has kernels for.

    Raises:
        UnsupportedError: built without CUDA, a module that cannot be loaded, no driver or one too old, no device, or
            devices of other architectures than were built.
    """
    if find_spec("._cuda", __package__) is None:
        raise UnsupportedError(
            "cuda: this installation was built without CUDA; with the CUDA toolkit (nvcc) here, build again: "
            f"FLEXIDEPTH_CUDA=ON {rebuild_command()}"
        )
    try:
        module = import_module("._cuda", __package__)
    except ImportError as error:
        raise UnsupportedError(
            f"cuda: flexidepth_ext._cuda cannot be loaded: {error}; build again: FLEXIDEPTH_CUDA=ON {rebuild_command()}"
        ) from error
    reason = why_not(module.find_devices(), module.archs)
    if reason is not None:
        raise UnsupportedError(f"cuda: {reason}")
    return module


def why_not(report: dict[str, Any], archs: str) -> str | None:
    """Why none of the devices can run the kernels, with the way out; None where one can.

    Args:
        report: of `_cuda.find_devices()`. archs: built architectures as CMake names them ("80-real,90").
    """
    runtime, driver = (_version(report[f"{name}_version"]) for name in ("runtime", "driver"))
    if report["error"] == _DRIVER_MISSING_OR_OLD:
        if not report["driver_version"]:
            return "no NVIDIA driver was found; install one, or use the CPU (device='cpu')"
        return (
            f"the NVIDIA driver supports CUDA up to {driver}, this build needs {runtime}; update the driver, or build "
            f"with an older CUDA toolkit: FLEXIDEPTH_CUDA=ON {rebuild_command()}"
        )
    if report["error"] == _NO_DEVICE or (not report["error"] and not report["devices"]):
        return (
            "the driver shows no device to this process; look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use the CPU "
            "(device='cpu')"
        )
    if report["error"]:
        return f"looking for devices failed: {report['error_text']} (error {report['error']})"
    if not any(has_kernels(device["capability"], archs) for device in report["devices"]):
        found = ", ".join(
            f"{device['name']} ({'.'.join(map(str, device['capability']))})"
            for device in report["devices"]
        )
        major, minor = report["devices"][0]["capability"]
        return (
            f"this build has kernels for {archs}, and the devices are {found}; build again: "
            f"FLEXIDEPTH_CUDA=ON FLEXIDEPTH_CUDA_ARCHS={major}{minor} {rebuild_command()}"
        )
    return None


def has_kernels(capability: tuple[int, int], archs: str) -> bool:
    """Whether a build runs on a device: its own code within a major version, PTX on everything newer."""
    major, minor = capability
    for arch in archs.split(","):
        number, _, kind = arch.partition("-")
        own_major, own_minor = divmod(_arch_number(number), 10)
        # What is built for "90a" is for 9.0 alone, for "100f" within its major version, PTX too.
        if number[-1] == "a" and capability != (own_major, own_minor):
            continue
        if number[-1] == "f" and own_major != major:
            continue
        if kind != "virtual" and own_major == major and own_minor <= minor:
            return True
        if kind != "real" and ptx_family(_arch_number(number)) <= 10 * major + minor:
            return True
    return False


def ptx_family(arch: int) -> int:
    """Architecture of the PTX that a build for `arch` keeps: devices of a family share one (cmake/CudaPlan.cmake)."""
    return 90 if arch >= 90 else min(arch, 80)


def can_overlap(capability: tuple[int, int], archs: str) -> bool:
    """Whether the code that a device of this capability runs waits for the kernels before it where it has to."""
    newer = [arch for arch in archs.split(",") if _arch_number(arch) >= 90]
    return capability >= (9, 0) and has_kernels(capability, ",".join(newer) or "0-real")


def _arch_number(arch: str) -> int:
    """90 of "90", "90a" and "90-real"."""
    return int(arch.partition("-")[0].rstrip("af"))


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
