"""Token ids of the tiny models."""

from __future__ import annotations

import pytest
import torch

from ..engine.conftest import VOCAB


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(11))
