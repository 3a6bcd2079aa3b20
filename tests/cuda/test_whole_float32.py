"""float32 products are whole whatever the caller asked of torch, in older words or newer, and stay asked for."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexidepth_ext.cuda_prompt import whole_float32

SETTINGS: Any = torch.backends.cuda.matmul
newer = pytest.mark.skipif(
    not hasattr(SETTINGS, "fp32_precision"), reason="this torch has only the older switch"
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """torch's settings are the process's."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)  # in both words


@newer
@pytest.mark.parametrize("own", ["tf32", "ieee"])
def test_the_newer_setting(own: str) -> None:
    SETTINGS.fp32_precision = own
    with whole_float32():
        assert SETTINGS.fp32_precision == "ieee"
    assert SETTINGS.fp32_precision == own
    with pytest.raises(KeyError), whole_float32():
        raise KeyError
    assert SETTINGS.fp32_precision == own


@pytest.mark.parametrize("own", ["highest", "high", "medium"])
def test_the_older_setting(own: Any) -> None:
    torch.set_float32_matmul_precision(own)
    with whole_float32():
        if hasattr(SETTINGS, "fp32_precision"):
            assert SETTINGS.fp32_precision == "ieee"
    assert SETTINGS.allow_tf32 is (own != "highest")
    if hasattr(SETTINGS, "fp32_precision"):  # the switch has no third position for "medium"
        assert torch.get_float32_matmul_precision() == own


@pytest.mark.parametrize("own", [True, False])
def test_a_torch_without_the_newer_setting(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    settings = SimpleNamespace(allow_tf32=own)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    with whole_float32():
        assert settings.allow_tf32 is False
    assert vars(settings) == {"allow_tf32": own}
