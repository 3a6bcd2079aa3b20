"""Bytes and time of skipping, by model, precision and machine, checked against what was measured:
`python -m flexidepth.bench.scaling`, from the repository. Takes seconds and measures nothing."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import FlexiDepthError, ValueOutOfRangeError
from flexidepth.plain_json import json_text
from flexidepth.plots import save_figure

from ..results_folder import check_folder, replace_results
from .figures import error_figure, speedup_figure, union_figure
from .measured import read_measured
from .page import with_blocks, write_page
from .recorded import FILE as ROUTING
from .recorded import read_recording
from .report import blocks, report
from .study import make_study

FILES = ("scaling.json", "scaling.md", "speedup.svg", "union.svg", "error.svg")
_RESULTS = Path("bench/results")
_PAGE = Path("docs/scaling.md")


def write_study(study: dict[str, Any], folder: Path) -> list[Path]:
    """JSON, Markdown and, where matplotlib is installed, figures: all of them or none. Returns what was written."""

    def write(new: Path) -> None:
        (new / "scaling.json").write_text(json_text(study, indent=1) + "\n", encoding="utf-8")
        (new / "scaling.md").write_text(report(study) + "\n", encoding="utf-8")
        with suppress(FlexiDepthError):
            save_figure(speedup_figure(study), new / "speedup.svg")
            save_figure(union_figure(study), new / "union.svg")
            save_figure(error_figure(study), new / "error.svg")

    return replace_results(folder, write, FILES)


@command_errors
def main(
    results: Annotated[Path, typer.Option(help="Measurements: its folders' files.")] = _RESULTS,
    routing: Annotated[
        Path | None, typer.Option(help="Recorded decisions; default: scaling/ of the results.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Default: scaling/ of the results.")
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="A page whose marked blocks are written; default: docs/scaling.md."),
    ] = None,
) -> None:
    """Compute, compare and write."""
    if not results.is_dir():
        raise ValueOutOfRangeError(
            f"scaling: {results} is no directory; wanted that of the measurements (--results)"
        )
    folder = output_dir or results / "scaling"
    check_folder(folder)
    recording = read_recording(routing or results / "scaling" / ROUTING)
    study = make_study(read_measured(results), recording)
    texts = blocks(study)
    target = page or (_PAGE if _PAGE.is_file() else None)
    if target is not None:  # before anything is written
        with_blocks(target.read_text(encoding="utf-8"), texts)
    for path in write_study(study, folder):
        say(str(path))
    if target is not None:
        write_page(target, texts)
        say(str(target))
    print(texts["errors"])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
