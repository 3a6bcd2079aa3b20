"""The files that describe the package agree with each other and with what is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flexidepth

ROOT = Path(__file__).resolve().parents[2]
MARKER = "<!-- test command -->"


def _project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML by itself")
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return table


def _constraints() -> Iterator[Requirement]:
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield Requirement(line)


def _pins() -> dict[str, str]:
    return {canonicalize_name(r.name): str(r.specifier) for r in _constraints()}


def _block(marker: str) -> str:
    """The one command between a marker of the README and the next end marker."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"{re.escape(marker)}\n```\w*\n(.*?)\n```\n<!-- end -->", text, re.DOTALL)
    assert found is not None, f"README.md lacks a fenced block after {marker}"
    return found.group(1)


def test_each_constraint_pins_one_version_of_any_build() -> None:
    for requirement in _constraints():
        assert re.fullmatch(r"==[^+*]+", str(requirement.specifier)), str(requirement)


def test_constraints_pin_what_is_asked_for_and_allow_it() -> None:
    project = _project()["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["test"], *extras["plot"], *extras["dev"]]
    pins = _pins()
    for text in asked:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt does not pin {name}"
        version = pins[name].removeprefix("==")
        assert requirement.specifier.contains(version), f"{text} does not allow {version}"


def test_the_version_is_said_once_and_repeated_rightly() -> None:
    assert _project()["project"]["version"] == flexidepth.__version__


def test_the_test_command_of_the_readme_is_a_whole_setup() -> None:
    command = _block(MARKER)
    assert command == (
        "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "
        '".[test]" && .venv/bin/python -m pytest -q -n auto --dist loadfile'
    )


def test_the_demo_command_of_the_readme_is_a_whole_setup() -> None:
    command = _block("<!-- demo command -->")
    assert command == (
        "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt . "
        "&& .venv/bin/flexidepth demo"
    )


def test_continuous_integration_reads_the_command_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    line = next(line for line in script.splitlines() if line.startswith("command="))
    result = subprocess.run(
        ["bash", "-euc", f'{line}; printf %s "$command"'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == _block(MARKER)


def test_a_build_holds_every_package_and_nothing_else(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    built = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.py*")}
    wanted = set()
    for folder, prefix in (
        ("python_api/flexidepth", "flexidepth"),
        ("bench", "flexidepth/bench"),
        ("flexidepth_ext", "flexidepth_ext"),
    ):
        for path in (ROOT / folder).rglob("*.py*"):
            if path.suffix in {".py", ".pyi"}:
                wanted.add(f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}")
    assert built == wanted
    assert (tmp_path / "flexidepth" / "py.typed").exists()
    assert (tmp_path / "flexidepth_ext" / "py.typed").exists()
    assert (tmp_path / "flexidepth" / "bench" / "gpu" / "costs.cu").exists()


def test_a_build_holds_the_trained_routings(tmp_path: Path) -> None:
    """Of a copy of the sources with one made up: the repository may have none yet."""
    copy, name = tmp_path / "sources", "pretrained/made-up"
    copy.mkdir()
    for folder in ("python_api", "bench", "flexidepth_ext"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so"))
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, copy / file)
    routing = copy / "python_api" / "flexidepth" / name
    routing.mkdir(parents=True)
    for file in ("config.json", "routing.safetensors", "README.md"):
        (routing / file).write_text("made up")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    built = {p.name for p in (tmp_path / "lib" / "flexidepth" / name).iterdir()}
    assert built == {"config.json", "routing.safetensors", "README.md"}


def test_bench_is_a_part_of_the_installed_package(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import flexidepth.bench.machine as m; print(m.__name__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "flexidepth.bench.machine", result.stderr


@pytest.mark.parametrize("editable", [False, True])
def test_a_checkout_does_not_hide_the_extension_that_was_installed(
    tmp_path: Path, editable: bool
) -> None:
    """Python started in a checkout finds its flexidepth_ext before the installed one, which alone is built."""
    places = {"installed": tmp_path / "site-packages", "checkout": tmp_path / "checkout"}
    for name, place in places.items():
        (place / "flexidepth_ext").mkdir(parents=True)
        (place / "flexidepth_ext" / "__init__.py").write_text(f"PLACE = {name!r}\n")
        (place / "flexidepth_ext" / "inner.py").write_text(f"PLACE = {name!r}\n")
    package = places["checkout"] / "python_api" if editable else places["installed"]
    (package / "flexidepth").mkdir(parents=True)
    shutil.copy(ROOT / "python_api" / "flexidepth" / "__init__.py", package / "flexidepth")
    code = (
        "import flexidepth, flexidepth_ext, flexidepth_ext.inner as inner; "
        "print(flexidepth_ext.PLACE, inner.PLACE)"
    )
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=places["checkout"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["checkout" if editable else "installed"] * 2, done.stderr
