"""The part of a page that a command writes: blocks between `<!-- scaling: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flexidepth.errors import DataError

_BLOCK = re.compile(r"(<!-- scaling: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """The page with every block exchanged.

    DataError for a marker of another name, a name without its marker, or a block that does not end.
    """
    found = [match.group(2) for match in _BLOCK.finditer(text)]
    starts = re.findall(r"<!-- scaling: ([\w-]+) -->", text)
    if sorted(found) != sorted(starts) or sorted(found) != sorted(blocks):
        raise DataError(
            f"scaling: the page has the blocks {', '.join(starts)}, {len(found)} of which end; wanted each of "
            f"{', '.join(blocks)} once, closed by <!-- end -->"
        )
    return _BLOCK.sub(lambda m: f"{m.group(1)}\n{blocks[m.group(2)]}\n\n{m.group(3)}", text)


def write_page(path: Path, blocks: Mapping[str, str]) -> None:
    """Exchange the blocks of a file, all of them or none."""
    text = with_blocks(path.read_text(encoding="utf-8"), blocks)
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
