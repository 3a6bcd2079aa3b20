"""Sampling on the device: the CPU's tokens for the same seeds, and transformers' own filters."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from flexidepth_ext import Engine
from flexidepth_ext.cuda_tensors import pack_sampling
from flexidepth_ext.errors import DtypeError, ShapeError, ValueOutOfRangeError

from ..engine.conftest import tiny_config, tiny_model, weights_of
from ..engine.test_sampling import filtered
from .conftest import on_cpu

ROWS = 60
FILTERS: list[dict[str, float]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 1},
    {"temperature": 0.0},
    {"top_p": 1e-6},
]


def cpu_tokens(logits, seeds, positions, options):
    model = tiny_model(tiny_config())
    with closing(Engine(model.config, weights_of(model), dtype=torch.float32)) as engine:
        return engine.sample(logits, seeds=seeds, positions=positions, **options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [7, 1500])
def test_the_cpus_tokens(ops, options, vocab):
    torch.manual_seed(vocab)
    logits = torch.randn(ROWS, vocab) * 3
    logits[:, 3] = logits[:, 5]  # ties
    logits[0, :3] = float("-inf")
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (ROWS,)), torch.arange(ROWS)
    everything = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    want, want_logprobs = on_cpu(cpu_tokens, logits, seeds, positions, everything)
    got, logprobs, faults = ops.sample(logits, seeds, positions, **everything)
    assert not faults.any()
    same = got == want
    # Masses in whole units fall on the other side of a border once in a long while.
    assert same.float().mean() >= 0.98
    torch.testing.assert_close(logprobs[same], want_logprobs[same], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [*FILTERS, {"top_k": 10**12}], ids=str)
def test_settings_in_device_memory_are_the_same(ops, options):
    """Bit for bit, and the numbers beside them are not read."""
    rows, vocab = 6, 300
    logits = torch.randn(rows, vocab) * 3
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (rows,)), torch.arange(rows)
    everything = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    settings = pack_sampling(**everything, vocab=vocab).to(logits.device)  # type: ignore[arg-type]
    want = ops.sample(logits, seeds, positions, **everything)
    for beside in ({}, {"temperature": 0.0}, {"temperature": 9.0, "top_k": 2, "min_p": 0.5}):
        got = ops.sample(logits, seeds, positions, settings=settings, **beside)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def drawn_by(emulated, ops, blocks, *arguments, **options):
    """What `blocks` blocks a row draw, of those that the device runs at once."""
    emulated.set_resident(2 * blocks * len(arguments[0]))
    try:
        before = emulated.launches()
        got = ops.sample(*arguments, **options)
        assert emulated.launches() == before + 1
        return got
    finally:
        emulated.set_resident(3)


@pytest.mark.parametrize("options", [{}, {"top_k": 12, "top_p": 0.8, "min_p": 0.05}], ids=str)
@pytest.mark.parametrize("vocab", [7, 5000])
def test_two_blocks_draw_as_one(emulated, ops, options, vocab):
    """Bit for bit. A NaN, a row without a finite value and one whose numbers are so large that nothing but the best is
    left have less to do than the one beside them, and hold nobody up."""
    torch.manual_seed(vocab)
    logits = torch.randn(4, vocab) * 3
    logits[0, 3] = logits[0, 5]
    logits[1, 2] = torch.nan
    logits[2] = float("-inf")
    logits[3] = 3e38
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (4,)), torch.arange(4)
    alone = drawn_by(emulated, ops, 1, logits, seeds, positions, **options)
    assert alone[2].tolist()[:3] == [0, 1, 2]
    got = drawn_by(emulated, ops, 2, logits, seeds, positions, **options)
    for one, other in zip(got, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_eight_blocks_draw_from_a_row(emulated, ops, options):
    """Where the device has room for more, no more; where it has for three, two."""
    logits, one = torch.randn(1, 9000), torch.ones(1, dtype=torch.long)
    want = drawn_by(emulated, ops, 1, logits, one, one, **options)
    for blocks in (3, 8, 20):
        got = drawn_by(emulated, ops, blocks, logits, one, one, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_where_blocks_may_not_wait_one_draws(emulated, ops, monkeypatch):
    """The device refuses, because it is shared; or the environment says so."""
    logits, one = torch.randn(1, 3000), torch.ones(1, dtype=torch.long)
    want = drawn_by(emulated, ops, 1, logits, one, one, top_p=0.9)

    def waited():
        before = emulated.launches_together()
        got = drawn_by(emulated, ops, 4, logits, one, one, top_p=0.9)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        return emulated.launches_together() > before

    assert waited()
    emulated.set_crowded(True)
    try:
        assert not waited()
    finally:
        emulated.set_crowded(False)
    monkeypatch.setenv("FLEXIDEPTH_CUDA_PERSISTENT", "0")
    assert not waited()


def test_settings_are_four_numbers(ops):
    logits, zero = torch.randn(2, 9), torch.zeros(2, dtype=torch.long)
    with pytest.raises(DtypeError, match=r"settings has dtype torch\.float32; wanted torch\.int32"):
        ops.sample(logits, zero, zero, settings=torch.zeros(4))
    with pytest.raises(ShapeError, match=r"settings is \[3\]; wanted \[4\]"):
        ops.sample(logits, zero, zero, settings=torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8, "min_p": 1.0},
        {"temperature": 1e-39},
        {"temperature": 1e-39, "top_k": 5, "top_p": 0.9},
        {"temperature": 1e-37, "top_p": 0.5},
    ],
    ids=str,
)
def test_where_only_the_best_is_left_it_is_drawn(ops, options):
    logits = torch.randn(ROWS, 300) * 30
    seeds, positions = torch.arange(ROWS), torch.arange(ROWS)
    tokens, logprobs, faults = ops.sample(logits, seeds, positions, **options)
    assert torch.equal(tokens.long(), logits.argmax(-1)) and not faults.any()
    assert torch.isfinite(logprobs).all()


def test_only_what_the_filters_leave(ops):
    logits = torch.randn(1, 60) * 2
    allowed = filtered(logits, 1.0, 12, 0.8, 0.05)[0] > 0
    many = logits.expand(120, -1).contiguous()
    tokens, _, _ = ops.sample(
        many, torch.arange(120), torch.zeros(120, dtype=torch.long), top_k=12, top_p=0.8, min_p=0.05
    )
    drawn = torch.bincount(tokens.long(), minlength=60) > 0
    assert not (drawn & ~allowed).any()
    assert (drawn & allowed).sum() >= allowed.sum() * 0.8


def test_equal_logits_at_the_border_of_top_p_are_kept_in_order(ops):
    """Ten equal tokens, half of the mass: the first five."""
    rows = 60
    tokens, _, _ = ops.sample(
        torch.zeros(rows, 10), torch.arange(rows), torch.zeros(rows, dtype=torch.long), top_p=0.5
    )
    assert sorted(set(tokens.tolist())) == [0, 1, 2, 3, 4]


def test_equal_logits_across_the_pieces_of_the_vocabulary(ops):
    """Of 608 light tokens about 105 are kept, so that some pieces keep all, one a part and the others none of them, and
    each has a heavy token behind its light ones."""
    logits = torch.zeros(ROWS, 640)
    logits[:, 19::20] = 2.0
    seeds, positions = torch.arange(ROWS) - 30, torch.arange(ROWS)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 0.4043, "min_p": 0.0}
    want, _ = on_cpu(cpu_tokens, logits, seeds, positions, options)
    got, _, _ = ops.sample(logits, seeds, positions, **options)
    light, heavy = got[got % 20 != 19], got[got % 20 == 19]
    assert torch.equal(got, want)
    assert len(light) > 5 and int(light.max()) < 112 and len(heavy) > 5 and int(heavy.max()) > 112


def test_faults(ops):
    logits = torch.randn(4, 9)
    logits[1, 4], logits[2], logits[3, 2] = float("nan"), float("-inf"), float("inf")
    zero = torch.zeros(4, dtype=torch.long)
    _, logprobs, faults = ops.sample(logits, zero, zero)
    assert faults.tolist() == [0, 1, 2, 2]
    assert logprobs.isnan().tolist() == [False, True, True, True]


def test_bad_arguments(ops):
    logits, zero = torch.randn(2, 9), torch.zeros(2, dtype=torch.long)
    for name, value in {"temperature": -1.0, "top_p": 0.0, "min_p": 2.0, "top_k": -1}.items():
        with pytest.raises(ValueOutOfRangeError, match=rf"{name} {value}"):
            ops.sample(logits, zero, zero, **{name: value})
    with pytest.raises(DtypeError, match=r"seeds has dtype torch\.int32"):
        ops.sample(logits, zero.int(), zero)
    with pytest.raises(ShapeError, match=r"positions is \[1\]; wanted \[2\]"):
        ops.sample(logits, zero, zero[:1])
