"""The typed stub of the compiled module, flexidepth_ext/_C.pyi.

`python tests/build/stub.py` writes it anew, `--check` only compares (exit code 1 if it differs).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).resolve().parents[2] / "flexidepth_ext" / "_C.pyi"
HEADER = "# Written by tests/build/stub.py from the compiled module; do not edit.\n"


# pybind11 3 says that a parameter takes whatever converts to a number, each release in its own words.
# Callers here pass int and float, and a type checker should hold them to it.
_TYPES = [
    (r"typing\.SupportsInt( \| typing\.SupportsIndex)?", "int"),
    (r"typing\.SupportsFloat( \| typing\.SupportsIndex)?", "float"),
    (r"\bdict\b(?!\[)", "dict[str, typing.Any]"),
]


def plain_types(line: str) -> str:
    """One line of a stub in the types that callers use."""
    if line.lstrip().startswith("def "):
        for pattern, name in _TYPES:
            line = re.sub(pattern, name, line)
    return line.rstrip()


def generate() -> str:
    """The stub of the `_C` that this interpreter loads."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "flexidepth_ext._C"]
        # Without --exit-code an unreadable signature would pass with a warning.
        result = subprocess.run(
            [*command, "--output-dir", folder, "--exit-code"],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise RuntimeError(f"pybind11-stubgen failed:\n{result.stdout}{result.stderr}")
        text = (Path(folder) / "flexidepth_ext" / "_C.pyi").read_text(encoding="utf-8")
    return HEADER + "\n".join(map(plain_types, text.splitlines())) + "\n"


def main() -> int:
    """Write or, with --check, compare."""
    stub = generate()
    if "--check" in sys.argv[1:]:
        same = STUB.exists() and STUB.read_text(encoding="utf-8") == stub
        print(
            f"{STUB.name} is {'up to date' if same else 'out of date: run python tests/build/stub.py'}"
        )
        return 0 if same else 1
    STUB.write_text(stub, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
