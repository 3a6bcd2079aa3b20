"""Fixtures of the checkpoint tests: no test reaches the network or the user's own cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints.tiny import save_base


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXIDEPTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A tiny Llama as transformers saves it."""
    folder = tmp_path / "llama"
    save_base(folder)
    return folder
