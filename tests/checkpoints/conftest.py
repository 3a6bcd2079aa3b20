"""Fixtures of the checkpoint tests: no test reaches the network or the user's own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.tiny import save_base


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXIDEPTH_CACHE", str(tmp_path / "cache"))

    def offline(repo_id: str, **_: Any) -> str:
        raise OSError(f"no route to the hub\nwhile looking for {repo_id}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A tiny Llama as transformers saves it."""
    folder = tmp_path / "llama"
    save_base(folder)
    return folder
