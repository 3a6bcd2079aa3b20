"""The command, as the tests of the command line call it."""

from __future__ import annotations

from tests.cli.conftest import run

__all__ = ["run"]
