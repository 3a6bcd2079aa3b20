"""Every op test runs on every instruction set of this processor, with one and with three threads."""

from __future__ import annotations

import pytest

from flexidepth_ext import _C, ops

# These round activations; test_linear_bf16_rounded has its own bounds for them.
ROUNDING_ISAS = ("avx512bf16", "amx")
EXACT_ISAS = [isa for isa in _C.available_isas() if isa not in ROUNDING_ISAS]


@pytest.fixture(params=EXACT_ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[1, 3])
def ctx(request: pytest.FixtureRequest, isa: str) -> object:
    return ops.context(request.param, isa)
