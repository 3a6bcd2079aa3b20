"""The emulation sees what would hang or corrupt a GPU: kernels with one mistake each."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from flexidepth_ext.errors import InternalError

from .conftest import FORWARD, REVERSE, SHUFFLED


@pytest.fixture
def run(emulated: ModuleType):
    def call(name: str, order: int = FORWARD, seed: int = 0) -> torch.Tensor:
        emulated.set_order(order, seed)
        source, out = torch.arange(68.0), torch.zeros(64)
        emulated.run_broken(name, source.data_ptr(), out.data_ptr())
        return out

    yield call
    emulated.set_order(FORWARD, 0)


@pytest.mark.parametrize("order", [FORWARD, REVERSE, SHUFFLED])
def test_a_kernel_with_its_barrier_is_right_in_every_order(run, order):
    assert run("whole", order).tolist() == [63.0 - i for i in range(64)]


@pytest.mark.parametrize("order", [FORWARD, REVERSE, SHUFFLED])
def test_a_missing_barrier_shows_as_nan(run, order):
    assert run("missing_barrier", order).isnan().any()


def test_shuffled_orders_differ_by_seed(run):
    one, two = (run("missing_barrier", SHUFFLED, seed).isnan() for seed in (1, 2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("divergent_barrier", r"block \(0, 0, 0\): thread 40 has left.*barrier broken\.cu:\d+"),
        ("two_barriers", r"thread 32 waits at the barrier broken\.cu:\d+, thread 0 at that of"),
        ("divergent_shuffle", r"thread 1 has left, its warp waits for it at broken\.cu:\d+"),
        ("misaligned", "a load of 16 bytes from a misaligned address"),
    ],
)
def test_what_hangs_or_corrupts_is_named(run, name, message):
    with pytest.raises(InternalError, match=message):
        run(name)


@pytest.fixture
def run_grid(emulated: ModuleType):
    """Four blocks; what each found, and the barrier's number when they have ended."""

    def call(name: str, order: int = FORWARD, launches: int = 1) -> tuple[list[float], int]:
        emulated.set_resident(4)
        emulated.set_order(order, 3)
        out, barrier = torch.zeros(4), torch.zeros(1, dtype=torch.int32)
        for _ in range(launches):
            emulated.run_broken_grid(name, out.data_ptr(), barrier.data_ptr())
        return out.tolist(), int(barrier) & 0x7FFFFFFF

    yield call
    emulated.set_resident(3)
    emulated.set_order(FORWARD, 0)


@pytest.mark.parametrize("order", [FORWARD, REVERSE, SHUFFLED])
@pytest.mark.parametrize("launches", [1, 2, 3])
def test_blocks_that_wait_for_each_other(run_grid, order, launches):
    assert run_grid("whole", order, launches) == ([1, 2, 3, 4], 0)


@pytest.mark.parametrize("order", [REVERSE, SHUFFLED])
def test_a_missing_barrier_of_the_grid_changes_the_result(run_grid, order):
    assert run_grid("no_barrier", order)[0] != [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "leaves",
            r"block \(0, 0, 0\): waits at the grid's barrier broken\.cu:\d+, block \(1, 0, 0\) has left",
        ),
        ("diverges", r"block \(1, 0, 0\): comes to the grid's barrier broken\.cu:\d+, others to"),
        ("not_at_rest", "the grid's barrier is not at rest"),
        ("reads_as_weights", "memory that was loaded as weights"),
        ("plain_launch", "a grid's barrier in a launch that is not cooperative"),
    ],
)
def test_mistakes_between_blocks_are_named(run_grid, name, message):
    with pytest.raises(InternalError, match=message):
        run_grid(name)
