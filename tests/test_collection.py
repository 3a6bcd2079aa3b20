"""That pytest looks into every folder of tests: it passes over some names, "build" among them, unless told not to."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {path.parent.name for path in TESTS.rglob("test_*.py")} - {TESTS.name}
    assert {"build", "ops", "cli"} <= folders
    hidden = [name for name in folders if any(fnmatch(name, pattern) for pattern in passed_over)]
    assert hidden == []
