"""What is said where CUDA cannot be used, and which devices a build runs on. No device is needed."""

from __future__ import annotations

from types import ModuleType

import pytest

from flexidepth_ext import cuda_device
from flexidepth_ext.cuda_device import can_overlap, has_kernels, why_not
from flexidepth_ext.errors import UnsupportedError

ARCHS = "80-real,86-real,90"
H100 = {"name": "H100", "capability": (9, 0), "multiprocessors": 132, "memory_bytes": 1}


def report(error: int = 0, driver: int = 13000, devices: tuple[dict, ...] = (H100,)) -> dict:
    return {
        "error": error,
        "error_text": "of CUDA",
        "runtime_version": 13000,
        "driver_version": driver,
        "devices": list(devices),
    }


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((9, 0), ARCHS, True),
        ((10, 0), ARCHS, True),  # by PTX of 90
        ((8, 0), ARCHS, True),
        ((8, 9), ARCHS, True),  # code of 86
        ((7, 5), ARCHS, False),
        ((8, 6), "89-real", False),
        ((9, 0), "80-real", False),
        ((12, 0), "120-virtual", True),
        ((8, 0), "86", True),  # 86 keeps the PTX of 80
        ((11, 0), "80-real,120", True),  # 120 keeps that of 90
        ((9, 0), "90a-real", True),
        ((9, 0), "90a", True),
        ((10, 0), "90a", False),  # its PTX, too, is for 9.0 alone
        ((10, 3), "100f", True),
        ((12, 0), "100f", False),
        ((8, 0), "90", False),
    ],
)
def test_which_devices_a_build_runs_on(capability, archs, runs):
    assert has_kernels(capability, archs) is runs


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (report(), None),
        (report(35, driver=0, devices=()), "no NVIDIA driver was found"),
        (report(35, driver=12040, devices=()), "supports CUDA up to 12.4, this build needs 13.0"),
        (report(100, devices=()), "shows no device to this process"),
        (report(devices=()), "shows no device to this process"),
        (report(999, devices=()), r"looking for devices failed: of CUDA \(error 999\)"),
        (
            report(devices=({**H100, "name": "T4", "capability": (7, 5)},)),
            r"kernels for 80-real,86-real,90, and the devices are T4 \(7\.5\).*FLEXIDEPTH_CUDA_ARCHS=75",
        ),
    ],
)
def test_reasons(found, message, monkeypatch):
    module = ModuleType("_cuda")
    module.find_devices, module.archs = lambda: found, ARCHS
    monkeypatch.setattr(cuda_device, "find_spec", lambda *_: object())
    monkeypatch.setattr(cuda_device, "import_module", lambda *_: module)
    if message is None:
        assert why_not(found, ARCHS) is None
        assert cuda_device.cuda_module() is module
    else:
        with pytest.raises(UnsupportedError, match=message):
            cuda_device.cuda_module()


def test_a_build_without_cuda_and_a_damaged_one(monkeypatch):
    monkeypatch.setattr(cuda_device, "find_spec", lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"built without CUDA; .*FLEXIDEPTH_CUDA=ON .*pip"):
        cuda_device.cuda_module()

    def broken(*_: object) -> None:
        raise ImportError("libx.so: no such file")

    monkeypatch.setattr(cuda_device, "find_spec", lambda *_: object())
    monkeypatch.setattr(cuda_device, "import_module", broken)
    with pytest.raises(UnsupportedError, match=r"cannot be loaded: libx\.so: no such file"):
        cuda_device.cuda_module()


@pytest.mark.parametrize(
    ("capability", "archs", "can"),
    [
        ((9, 0), ARCHS, True),
        ((12, 0), "80-real,120", True),
        ((9, 0), "80", False),  # its PTX knows nothing of overlapping
        ((9, 0), "80,100-real", False),
        ((8, 9), ARCHS, False),
        # PTX of these is not for other devices, which run the code of 80 then.
        ((10, 0), "80,90a", False),
        ((12, 0), "80,100a", False),
        ((9, 0), "80,100f", False),
        ((9, 0), "80,90a", True),
    ],
)
def test_kernels_overlap_where_the_code_that_runs_can_wait(capability, archs, can):
    assert can_overlap(capability, archs) is can
