"""`python -m flexidepth_ext`: print the report; exit code 1 if the compiled module cannot be loaded."""

from __future__ import annotations

import sys

from .build_info import collect, render


def main() -> int:
    """Print the report and return the exit code."""
    report = collect()
    print(render(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
