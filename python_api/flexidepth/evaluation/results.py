"""The files of an evaluation: JSON, Markdown and figures, all of one run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.results_folder import check_folder, replace_results
from ..errors import FlexiDepthError
from ..plain_json import json_text
from .report import report_text
from .rows import KindRow, TextRow

if TYPE_CHECKING:
    from .run import EvalResult

FILES = ("eval.json", "eval.md", "eval.png", "kinds.png")


def check_output(folder: Path) -> None:
    """SaveError where results could not be written: better now than after minutes of measuring."""
    check_folder(folder)


def write_results(result: EvalResult, folder: Path) -> list[Path]:
    """Write FILES (figures where matplotlib is installed and there is something to draw): all or none.

    SaveError where the folder cannot be written to; results of an earlier run are replaced as a whole.

    Returns:
        The paths written.
    """
    content = result.to_dict()

    def write(new: Path) -> None:
        from ..plots import kinds_figure, quality_figure, save_figure

        (new / "eval.json").write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
        (new / "eval.md").write_text(report_text(result) + "\n", encoding="utf-8")
        # Without matplotlib the figures are still in the JSON; `flexidepth plot` draws them later.
        with suppress(FlexiDepthError):
            if any(isinstance(row, TextRow) for row in result.rows):
                save_figure(quality_figure(content), new / "eval.png")
            if any(isinstance(row, KindRow) for row in result.rows):
                save_figure(kinds_figure(content), new / "kinds.png")

    return list(replace_results(folder, write, FILES))
