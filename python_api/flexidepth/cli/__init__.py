"""The `flexidepth` command. Each command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
