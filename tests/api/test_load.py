"""from_pretrained(): what its arguments do, and which of them are refused."""

from __future__ import annotations

import pytest
import torch

from flexidepth.errors import (
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedError,
    ValueOutOfRangeError,
)
from flexidepth.llm import FlexiDepth
from flexidepth_ext import rebuild_command

from ..checkpoints.tiny import save_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llama"
    save_base(path)
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_num_threads(folder, threads):
    with FlexiDepth.from_pretrained(folder, num_threads=threads) as llm:
        assert llm.engine.num_threads == threads


def test_progress_counts_every_tensor(folder):
    seen = []
    with FlexiDepth.from_pretrained(folder, progress=lambda *a: seen.append(a)) as llm:
        total = len(seen)
        assert seen == [(i, total) for i in range(1, total + 1)] and total > 36
        assert llm.generate([1], max_new_tokens=1).token_ids


def test_strict_router_and_seed_reach_the_engine(folder):
    def gates(**arguments):
        with FlexiDepth.from_pretrained(folder, dtype="float32", **arguments) as llm:
            out = llm.generate([1, 2, 3], max_new_tokens=4, eos_token_id=-1, return_routing=True)
            return out.routing.gates

    exact, folded = gates(strict_router=True), gates()
    torch.testing.assert_close(exact, folded, rtol=1e-4, atol=1e-5)
    assert not torch.equal(exact, folded)  # the same maths in another order
    assert torch.equal(gates(seed=0), folded) and not torch.equal(gates(seed=1), folded)


def test_routing_and_prefer_hub_reach_the_checkpoint(folder, monkeypatch):
    with FlexiDepth.from_pretrained(folder, routing={"routing_layers": [1]}) as llm:
        assert list(llm.config.routing_layers) == [1]
    seen = []

    def opened(name, **arguments):
        seen.append(arguments["prefer_hub"])
        raise ModelNotFoundError("enough")

    monkeypatch.setattr("flexidepth.llm.open_checkpoint", opened)
    for prefer_hub in (True, False):
        with pytest.raises(ModelNotFoundError, match="enough"):
            FlexiDepth.from_pretrained(folder, prefer_hub=prefer_hub)
    assert seen == [True, False]


def test_a_model_larger_than_the_memory_is_refused_before_it_is_read(folder, monkeypatch):
    monkeypatch.setattr("flexidepth.loading.available_memory_bytes", lambda: 10_000)
    with pytest.raises(OutOfMemoryError, match=r"0\.00 GB of memory are available; close"):
        FlexiDepth.from_pretrained(folder)
    monkeypatch.setattr("flexidepth.loading.available_memory_bytes", lambda: None)
    FlexiDepth.from_pretrained(folder).close()


def test_max_length(folder):
    with FlexiDepth.from_pretrained(folder, max_length=20) as llm:
        assert llm.max_length == llm.new_cache().kv.max_length == 20
        with pytest.raises(ValueOutOfRangeError, match="do not fit 20 positions"):
            llm.generate([1] * 10, max_new_tokens=12)
    with FlexiDepth.from_pretrained(folder) as llm:
        assert llm.max_length == 128


@pytest.mark.parametrize("bad", [0, -5, 10**6, 8.0, "8"])
def test_bad_max_length(folder, bad):
    with pytest.raises(ValueOutOfRangeError, match=r"max_length is .*, 1 to 128, the model's"):
        FlexiDepth.from_pretrained(folder, max_length=bad)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_threads", "2"), ("num_threads", 2.0), ("num_threads", 0), ("seed", "x"), ("seed", 1.0)],
)
def test_numbers_are_refused_before_anything_is_read(name, value):
    with pytest.raises(ValueOutOfRangeError, match=f"{name} is .*; wanted a whole number"):
        FlexiDepth.from_pretrained("no/such/model", **{name: value})


def test_device_and_dtype(monkeypatch):
    def built_without():
        raise UnsupportedError(f"cuda: FLEXIDEPTH_CUDA=ON {rebuild_command()}")

    monkeypatch.setattr("flexidepth_ext.cuda_runtime.cuda_module", built_without)
    with pytest.raises(UnsupportedError, match="FLEXIDEPTH_CUDA=ON"):
        FlexiDepth.from_pretrained("anything", device="cuda:0")
    with pytest.raises(ValueOutOfRangeError, match="num_threads is 2; threads are the CPU's"):
        FlexiDepth.from_pretrained("anything", device="cuda", num_threads=2)
    for device in ("tpu", "cuda:x", "cpu:0", 3, None):
        with pytest.raises(ValueOutOfRangeError, match=f"device {device!r}: wanted 'auto'"):
            FlexiDepth.from_pretrained("anything", device=device)
    for dtype in ("int3", 3, None):
        with pytest.raises(UnsupportedError, match=f"dtype {dtype!r}: the CPU engine takes"):
            FlexiDepth.from_pretrained("anything", dtype=dtype)
