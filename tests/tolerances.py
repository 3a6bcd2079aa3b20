"""How close a kernel must come: at most twice the error of the same maths in torch at the same type.

Errors are root mean squares against float64: the largest single error is a lottery, their mean is not. Where
torch's own error is tiny, by luck or because its processor adds in many pieces, a unit in the last place of the largest
value is allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_exact_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, factor: float = 2.0
) -> None:
    """RMS error of `ours` <= factor x that of `torchs`, both against float64 `exact`."""
    assert exact.dtype == torch.float64
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all()
    error = (ours.double() - exact).square().mean().sqrt().item()
    theirs = (torchs.double() - exact).square().mean().sqrt().item()
    floor = torch.finfo(torch.float32).eps * exact.abs().max().item()
    assert error <= factor * max(theirs, floor), (
        f"error {error:.3e}, torch's {theirs:.3e}, floor {floor:.3e}"
    )
