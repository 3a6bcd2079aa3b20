"""The tables of the pages, out of committed results: `python -m flexidepth.bench.readme [PAGE ...] [--check]`.

A table stands between `<!-- table NAME: RESULT -->` and `<!-- end -->`; RESULT is a JSON file, its path
from the page.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import CheckpointError, SaveError

from .quality_tables import bytes_table, quality_table, tasks_table, variant_tasks_table
from .speed_tables import answers_table, breakdown_table, decode_table, prompt_table

PAGES = ("README.md", "docs/training.md", "python_api/flexidepth/pretrained/smollm2-135m/README.md")
KINDS: dict[str, Callable[[Path], str]] = {
    "quality": quality_table,
    "tasks": tasks_table,
    "bytes_prose": functools.partial(bytes_table, subject="prose"),
    "bytes_answers": functools.partial(bytes_table, subject="distilled"),
    "variant_tasks": variant_tasks_table,
    "decode": decode_table,
    "prompt": prompt_table,
    "breakdown": breakdown_table,
    "answers": answers_table,
}
_MARKED = re.compile(r"(<!-- table (\w+): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(text: str, folder: Path) -> str:
    """A page with its tables made anew from the results in `folder`.

    CheckpointError where a table is of an unknown kind or its result cannot be read.
    """

    def made(match: re.Match[str]) -> str:
        head, name, source, end = match.groups()
        if name not in KINDS:
            raise CheckpointError(f"readme: no table {name!r}; wanted one of {', '.join(KINDS)}")
        return f"{head}{KINDS[name](folder / source)}\n{end}"

    return _MARKED.sub(made, text)


@command_errors
def main(
    pages: Annotated[
        list[Path] | None, typer.Argument(metavar="[PAGE]...", help="Pages with tables.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if one differs.")
    ] = False,
) -> None:
    """Make the tables anew."""
    wrong = []
    for page in pages or map(Path, PAGES):
        text = page.read_text(encoding="utf-8")
        made = tables(text, page.resolve().parent)
        if made == text:
            say(f"{page}: its tables are those of the results")
        elif check:
            wrong.append(str(page))
        else:
            page.write_text(made, encoding="utf-8")
            say(f"wrote {page}")
    if wrong:
        raise SaveError(
            f"readme: {', '.join(wrong)}: tables that are not those of the results; "
            "`python -m flexidepth.bench.readme` writes them"
        )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
