"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """The first of `cells` is the heading; the first column holds words, the others numbers."""
    heading, *rows = cells
    lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
