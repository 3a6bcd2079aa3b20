from __future__ import annotations

import pytest
import torch

from flexidepth import reference
from flexidepth_ext import ops
from flexidepth_ext.errors import DtypeError, ShapeError

from ..tolerances import assert_as_exact_as_torch


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 576), (3, 17), (70, 576)])
def test_rms_norm(ctx, rows, width):
    x, w = torch.randn(rows, width) * 3, torch.randn(width)
    exact = reference.rms_norm(x.double(), w.double(), 1e-5)
    assert_as_exact_as_torch(
        ops.rms_norm(x, w, 1e-5, ctx=ctx), reference.rms_norm(x, w, 1e-5), exact
    )


def test_rms_norm_of_a_row_ignores_the_others(isa):
    x, w = torch.randn(300, 576), torch.randn(576)
    whole = ops.rms_norm(x, w, 1e-5, ctx=ops.context(3, isa))
    single = torch.cat(
        [ops.rms_norm(row[None].contiguous(), w, 1e-5, ctx=ops.context(1, isa)) for row in x]
    )
    assert torch.equal(whole, single)


@pytest.mark.parametrize("head_dim", [2, 16, 64, 80])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_rope(ctx, head_dim, parameters):
    x, positions = torch.randn(50, 3 * head_dim), torch.randint(0, 300, (50,))
    inv_freq = reference.rope_inv_freq(head_dim, parameters)

    def rotate(dtype):
        cos, sin = reference.rope_cos_sin(positions, inv_freq, dtype)
        heads = x.to(dtype).view(50, 3, head_dim)
        return reference.apply_rope(heads, cos[:, None], sin[:, None]).reshape(50, -1)

    # Angles are float32 in both; float64 arithmetic on top of them is the yardstick.
    angles = positions.float()[:, None] * inv_freq
    exact = torch.cat((angles, angles), -1).double()
    heads = x.double().view(50, 3, head_dim)
    exact = reference.apply_rope(heads, exact.cos()[:, None], exact.sin()[:, None]).reshape(50, -1)
    assert_as_exact_as_torch(
        ops.rope(x, positions, inv_freq, head_dim, ctx=ctx), rotate(torch.float32), exact
    )


def test_types_and_shapes_are_checked():
    with pytest.raises(DtypeError, match="float64"):
        ops.rms_norm(torch.randn(2, 4).double(), torch.randn(4), 1e-5)
    with pytest.raises(ShapeError, match=r"weight is \[3\]"):
        ops.rms_norm(torch.randn(2, 4), torch.randn(3), 1e-5)
    with pytest.raises(ShapeError, match="multiple of head_dim 3"):
        ops.rope(torch.randn(2, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(1), 3)
