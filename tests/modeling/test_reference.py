"""The maths itself, against torch's own functions, formulas by hand, and the properties that define it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flexidepth import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEFAULT = {"rope_theta": 1e4, "rope_type": "default"}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def router(d: int = 24, r: int = 6, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        "enc": random(r, d, dtype=dtype) / d**0.5,
        "norm": random(r, dtype=dtype),
        "dec": random(d, r, dtype=dtype) / r**0.5,
        "head": random(1, d, dtype=dtype) / d**0.5,
        "bias": random(1, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_keeps_the_type_and_torchs_value(dtype):
    x, weight = random(7, 32, dtype=dtype) * 3, random(32, dtype=dtype)
    got = reference.rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    want = F.rms_norm(x.double(), (32,), weight.double(), 1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=3 * eps, atol=eps)


def test_rms_norm_takes_the_variance_in_float32():
    # The square of 300 is beyond float16, and 1e-4 squared is below it.
    for size in (300.0, 1e-4):
        x = torch.full((1, 8), size, dtype=torch.float16)
        got = reference.rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-12)
        torch.testing.assert_close(got, torch.ones_like(got), rtol=2e-3, atol=0)


@pytest.mark.parametrize("order", ["norm_tanh", "tanh_norm"])
def test_router_gate_by_hand(order):
    w, x = router(), random(5, 24)
    e = x @ w["enc"].T
    if order == "norm_tanh":
        z = torch.tanh(e / (e.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm"])
    else:
        t = torch.tanh(e)
        z = t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["norm"]
    want = torch.sigmoid(z @ w["dec"].T @ w["head"].T + w["bias"]).squeeze(-1)
    got = reference.router_gate(x, **w, eps=1e-5, order=order)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    folded = reference.router_gate(x, **w, eps=1e-5, order=order, fold=True)
    torch.testing.assert_close(folded, want, rtol=1e-12, atol=1e-12)
    without = reference.router_gate(x, **{**w, "bias": None}, eps=1e-5, order=order)
    assert (without - got).abs().min() > 1e-4


def test_router_orders_differ():
    w, x = router(), random(5, 24)
    gates = [reference.router_gate(x, **w, eps=1e-5, order=o) for o in ("norm_tanh", "tanh_norm")]
    assert (gates[0] - gates[1]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="router order 'norm'"):
        reference.router_gate(x, **w, eps=1e-5, order="norm")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_router_is_float32_in_a_model_of_half_precision(dtype):
    w, x = router(dtype=dtype), random(64, 24, dtype=dtype)
    got = reference.router_gate(x, **w, eps=1e-5, order="norm_tanh")
    wide = {name: tensor.float() for name, tensor in w.items()}
    want = reference.router_gate(x.float(), **wide, eps=1e-5, order="norm_tanh")
    assert got.dtype == torch.float32 and torch.equal(got, want)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40))
def test_folding_changes_float32_gates_in_their_last_bits_only(seed, rows):
    torch.manual_seed(seed)
    w, x = router(dtype=torch.float32), random(rows, 24, dtype=torch.float32)
    strict, folded = (
        reference.router_gate(x, **w, eps=1e-5, order="norm_tanh", fold=fold)
        for fold in (False, True)
    )
    torch.testing.assert_close(folded, strict, rtol=1e-5, atol=1e-6)


def test_decision_is_strict():
    gates = torch.tensor([[0.5, 0.5], [0.50001, 0.2]])
    run = reference.decide(gates, torch.tensor([0.5, 0.1]))
    assert run.tolist() == [[False, True], [True, True]]
    assert not reference.decide(torch.tensor([1.0]), 1.0).any()


@given(run=st.lists(st.booleans(), max_size=50))
def test_compaction_splits_every_row_once_in_order(run):
    running, skipping = reference.compact(torch.tensor(run, dtype=torch.bool))
    assert running.tolist() == [i for i, r in enumerate(run) if r]
    assert skipping.tolist() == [i for i, r in enumerate(run) if not r]


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=20))
def test_scales_take_one_path(rows):
    gates, run = (torch.tensor(column) for column in zip(*rows, strict=True))
    for unit in (False, True):
        fed, adapted = reference.gate_scales(gates, run, unit=unit)
        assert torch.equal(fed, torch.where(run, torch.ones(()) if unit else gates, 0.0))
        assert torch.equal(adapted, torch.where(run, 0.0, torch.ones(()) if unit else 1 - gates))


@settings(max_examples=25, deadline=None)
@given(
    shift=st.integers(0, 5000),
    a=st.integers(0, 50),
    b=st.integers(0, 50),
    kind=st.sampled_from(["default", "linear", "llama3"]),
)
def test_rotation_sees_distances_alone_and_keeps_lengths(shift, a, b, kind):
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    freq = reference.rope_inv_freq(16, {"rope_theta": 1e4, "rope_type": kind, **scaling})
    torch.manual_seed(a + 51 * b)
    q, k = random(16), random(16)

    def rotated(x, position):
        return reference.apply_rope(
            x, *reference.rope_cos_sin(torch.tensor(position), freq, torch.float64)
        )

    torch.testing.assert_close(
        rotated(q, a) @ rotated(k, b), rotated(q, a + shift) @ rotated(k, b + shift)
    )
    torch.testing.assert_close(rotated(q, a).norm(), q.norm())


def test_frequencies_by_hand():
    freq = reference.rope_inv_freq(8, DEFAULT)
    torch.testing.assert_close(freq, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    linear = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    assert torch.equal(reference.rope_inv_freq(8, linear), freq / 4)
    llama3 = {
        "rope_theta": 1e4,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    # Wavelengths 6.28, 62.8, 628, 6283 against 128 / 4 = 32 and 128 / 1: kept, blended, divided, divided.
    smooth = (128 / 62.8318530718 - 1) / 3
    want = [1.0, (1 - smooth) * 0.1 / 8 + smooth * 0.1, 0.01 / 8, 0.001 / 8]
    torch.testing.assert_close(reference.rope_inv_freq(8, llama3), torch.tensor(want))


@pytest.mark.parametrize("window", [None, 1, 5])
def test_attention_equals_torchs_over_what_each_query_may_see(window):
    q, k, v = random(2, 6, 4, 8), random(2, 2, 12, 8), random(2, 2, 12, 8)
    q_positions = torch.tensor([[0, 3, 7, 11], [1, 2, 8, 9]])  # gathered queries: gaps between them
    mask = reference.attention_mask(q_positions, torch.arange(12).expand(2, -1), window)
    got = reference.attention(q, k, v, mask[:, None])
    for b in range(2):
        for i, position in enumerate(q_positions[b].tolist()):
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            for head in range(6):
                kept, read = k[b, head // 3, seen], v[b, head // 3, seen]
                want = torch.softmax(kept @ q[b, head, i] / 8**0.5, 0) @ read
                torch.testing.assert_close(got[b, head, i], want, rtol=1e-10, atol=1e-10)


def test_gated_mlp_by_hand():
    y, gate, up, down = random(3, 8), random(12, 8), random(12, 8), random(8, 12)
    biases = random(12), random(12), random(8)
    g = y @ gate.T + biases[0]
    want = (g * torch.sigmoid(g) * (y @ up.T + biases[1])) @ down.T + biases[2]
    torch.testing.assert_close(reference.gated_mlp(y, gate, up, down, biases), want)
    plain = y @ gate.T
    torch.testing.assert_close(
        reference.gated_mlp(y, gate, up, down),
        (plain * torch.sigmoid(plain) * (y @ up.T)) @ down.T,
    )


def test_lm_head_norms_first():
    h, norm, weight = random(3, 8), random(8), random(11, 8)
    want = F.rms_norm(h, (8,), norm, 1e-5) @ weight.T
    torch.testing.assert_close(reference.lm_head(h, norm, weight, 1e-5), want)
