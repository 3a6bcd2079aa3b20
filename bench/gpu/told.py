"""Errors in words."""

from __future__ import annotations

_MOST_SAID = 600  # characters of an error


def told(error: BaseException) -> str:
    """What stopped something, as a cell of a table."""
    words = f"stopped: {type(error).__name__}: {error}".split()
    return " ".join(words).replace("|", "/")[:_MOST_SAID]
