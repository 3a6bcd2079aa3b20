"""The CUDA ops on the CPU: the kernels of csrc/cuda, emulated; each test in two orders of threads.

With FLEXIDEPTH_TEST_DEVICE=cuda the same tests run on the device, as flexidepth.bench.gpu_check does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.cuda_ops import CudaOps, cuda_ops
from flexidepth_ext.cuda_runtime import CudaRuntime
from tests.emulation.build import build, build_folder, load

from ..engine.conftest import VOCAB, weights_of
from .broken_device import (  # noqa: F401
    ON_DEVICE,
    pytest_runtest_logfinish,
    pytest_runtest_logreport,
)
from .runtime import FakeRuntime

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORWARD, REVERSE, SHUFFLED = range(3)
ORDERS = {"forward": FORWARD, "reverse": REVERSE}


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The module; FLEXIDEPTH_EMULATED names another build of it, say one with sanitizers."""
    if ON_DEVICE:
        pytest.skip("about the emulation, and these tests run on the device")
    given = os.environ.get("FLEXIDEPTH_EMULATED")
    return load(Path(given) if given else build(build_folder("emulation")))


@pytest.fixture(params=["device"] if ON_DEVICE else list(ORDERS))
def ops(request: pytest.FixtureRequest) -> Iterator[CudaOps]:
    """The ops; tensors that a test makes are where they want them."""
    if ON_DEVICE:
        with torch.device("cuda"):
            yield cuda_ops()
        return
    emulated = request.getfixturevalue("emulated")
    emulated.set_order(ORDERS[request.param], 0)
    yield CudaOps(emulated, "cpu")
    emulated.set_order(FORWARD, 0)


def on_cpu(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `function` gives for the same tensors on the CPU, its result where tensors of the test are."""

    def moved(values: Any, device: Any) -> Any:
        return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, values)

    here = torch.empty(0).device
    with torch.device("cpu"):
        result = function(*moved(arguments, "cpu"), **moved(options, "cpu"))
    return moved(result, here)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., CudaEngine]]:
    """An engine of a model: on the emulated device, or on the one that is there. Unless asked otherwise, every phase is
    a kernel: what the persistent one is compared with."""
    made: list[CudaEngine] = []

    def engine(model, dtype=torch.float32, **arguments):
        runtime = CudaRuntime() if ON_DEVICE else FakeRuntime(request.getfixturevalue("emulated"))
        forms = {"overlap": False, "persistent": False}
        arguments = {"max_rows": 64, "runtime": runtime, **forms, **arguments}
        made.append(CudaEngine(model.config, weights_of(model), dtype=dtype, **arguments))
        return made[-1]

    yield engine
    for one in made:
        one.close()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(
        0, VOCAB, (40,), dtype=torch.int32, generator=torch.Generator().manual_seed(7)
    )
