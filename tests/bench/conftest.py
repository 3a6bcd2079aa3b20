"""The command, as the tests of the command line call it; the committed study and its inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import model, run

__all__ = ["committed", "model", "results", "run"]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def results() -> Path:
    """The folder of committed measurements."""
    return ROOT / "bench" / "results"


@pytest.fixture(scope="session")
def committed(results: Path) -> dict[str, Any]:
    """The committed study."""
    text = (results / "scaling" / "scaling.json").read_text(encoding="utf-8")
    study: dict[str, Any] = json.loads(text)
    return study
