"""What stands between the engine and a device, where there is none; memory that is looked at before it is filled."""

from __future__ import annotations

import pytest
import torch

from flexidepth.loading import load_engine, resolve_device, resolve_dtype
from flexidepth_ext import cuda_runtime
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.cuda_runtime import CudaRuntime
from flexidepth_ext.errors import OutOfMemoryError, UnsupportedError

from ..engine.conftest import tiny_config, tiny_model, weights_of
from .runtime import FakeRuntime


@pytest.mark.parametrize(
    ("version", "what"), [(None, "was built without CUDA"), ("13.0", "finds no device")]
)
def test_a_torch_without_cuda_or_a_device_is_named(monkeypatch, version, what):
    monkeypatch.setattr(cuda_runtime, "cuda_module", lambda: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(UnsupportedError, match=rf"torch .* {what}.*device='cpu'"):
        CudaRuntime()


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "cuda_module", lambda: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UnsupportedError, match=r"device cuda:2; there are 2, counted from 0"):
        resolve_device("cuda:2")


def test_types_of_each_engine():
    assert resolve_dtype("auto", cuda=True) is torch.bfloat16
    assert resolve_dtype("float16", cuda=True) is torch.float16
    with pytest.raises(UnsupportedError, match="the CPU engine takes"):
        resolve_dtype("float16")
    with pytest.raises(UnsupportedError, match=r"the CUDA engine takes .*float16"):
        resolve_dtype("int8", cuda=True)


class Opened:
    """A checkpoint as load_engine sees it."""

    def __init__(self, model):
        self.config, self.model = model.config, model

    def nbytes_estimate(self, dtype):
        return 5_000_000_000

    def tensors(self):
        return iter(weights_of(self.model))


def test_a_model_is_weighed_before_it_is_loaded(emulated):
    opened = Opened(tiny_model(tiny_config()))
    seen: list[tuple[int, int]] = []
    arguments = {"num_threads": None, "strict_router": False}

    def load(runtime):
        return load_engine(
            opened,  # type: ignore[arg-type]
            torch.float32,
            progress=lambda *done: seen.append(done),
            runtime=runtime,
            **arguments,  # type: ignore[arg-type]
        )

    with pytest.raises(OutOfMemoryError, match=r"need 5\.00 GB, 4\.00 GB of memory are available"):
        load(FakeRuntime(emulated, free=4_000_000_000))
    assert seen == []
    engine = load(FakeRuntime(emulated))
    assert isinstance(engine, CudaEngine) and seen[-1][0] == len(seen)
    engine.close()
    assert engine.weight_bytes == 0 and engine.closed


def test_no_memory_while_loading(emulated, monkeypatch):
    model = tiny_model(tiny_config())

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr("flexidepth_ext.cuda_weights._placed", refuse)
    with pytest.raises(OutOfMemoryError, match=r"no memory to load the model.*smaller dtype"):
        CudaEngine(
            model.config, weights_of(model), dtype=torch.float32, runtime=FakeRuntime(emulated)
        )
