"""The committed stub is the one that the compiled module gives."""

from __future__ import annotations

import pytest

from flexidepth_ext import _C

from . import stub


@pytest.mark.skipif(
    int(_C.build_info()["pybind11"].partition(".")[0]) < 3,
    reason="signatures of pybind11 2 are worded differently",
)
def test_the_stub_is_up_to_date() -> None:
    assert stub.STUB.read_text(encoding="utf-8") == stub.generate(), (
        "run python tests/build/stub.py"
    )


def test_number_parameters_are_plain_numbers() -> None:
    line = "    def f(n: typing.SupportsInt | typing.SupportsIndex, x: typing.SupportsFloat) -> dict:  "
    assert stub.plain_types(line) == "    def f(n: int, x: float) -> dict[str, typing.Any]:"
