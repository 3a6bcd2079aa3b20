"""Hooks of pytest: a test that leaves the device unusable for its process ends that process, not the tests behind it.

After an illegal address, say, every later CUDA call of a process fails. Under xdist a worker that ends is replaced, and
the new one goes on behind the test it ended at: that test is told twice, as it failed and as where a worker ended.
"""

from __future__ import annotations

import os

import pytest
import torch

ON_DEVICE = os.environ.get("FLEXIDEPTH_TEST_DEVICE") == "cuda"
_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what failed."""
    if report.failed:
        _failed.add(report.nodeid)


@pytest.hookimpl(trylast=True)  # xdist has sent the reports of the test by then
def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a worker whose device does nothing any more."""
    if nodeid not in _failed or not ON_DEVICE or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    try:
        torch.cuda.synchronize()
    except Exception:
        os._exit(1)
