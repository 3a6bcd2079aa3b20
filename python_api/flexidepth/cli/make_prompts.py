"""flexidepth make-prompts"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import command_errors, say

_HELP = """Write made-up tasks as prompts: copying, lists, reckoning, and summaries of texts you give.

Each line has a prompt and, where there is one right answer, the answer. Tasks of the split "eval" are
kept out of the split "train" by a hash, whatever the seeds.

Example: flexidepth make-prompts tasks.jsonl --kinds copy,list,add,multiply --count 500
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="make-prompts", help=_HELP)(make_prompts)


@command_errors
def make_prompts(
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    kinds: Annotated[
        str, typer.Option(help="Any of copy, list, add, multiply, summarise, continue.")
    ] = "copy,list,add,multiply",
    count: Annotated[int, typer.Option(min=1, help="Tasks of each kind.")] = 500,
    seed: Annotated[int, typer.Option(help="Another seed gives other tasks.")] = 0,
    split: Annotated[
        str, typer.Option(help="train or eval; all, of texts that are held apart already.")
    ] = "train",
    texts: Annotated[
        Path | None,
        typer.Option(help="Texts to summarise or continue: .jsonl or .txt, as for training."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
) -> None:
    from ..training.documents import read_documents
    from ..training.made_tasks import FROM_TEXTS, KINDS, SPLITS, make_tasks
    from ..training.writing import write_lines

    wanted = kinds.split(",")
    for kind in wanted:
        if kind not in KINDS:
            raise typer.BadParameter(f"--kinds {kind!r}: wanted some of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise typer.BadParameter(f"--split {split!r}: wanted {' or '.join(SPLITS)}")
    needing = [kind for kind in wanted if kind in FROM_TEXTS]
    if bool(needing) != (texts is not None):
        raise typer.BadParameter(
            f"--kinds {','.join(needing)} needs --texts FILE"
            if needing
            else f"--texts is for {' and '.join(FROM_TEXTS)}, none of which is among --kinds"
        )
    given = [] if texts is None else [d.text for d in read_documents(texts) if d.text is not None]
    tasks = [
        task
        for kind in dict.fromkeys(wanted)
        for task in make_tasks(
            kind, count, seed, split=split, texts=given if kind in FROM_TEXTS else None
        )
    ]
    write_lines(out, tasks, overwrite=overwrite)
    say(f"{len(tasks)} prompts")
    print(out)
