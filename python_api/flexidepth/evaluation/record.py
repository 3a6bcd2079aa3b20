"""Rows kept as they are measured, so that a run that is killed loses none and the next one goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..plain_json import json_text
from .points import Point
from .rows import Key, Row, row_from_dict

PARTIAL = "eval.partial.json"
FORMAT = "flexidepth-eval-1"


class Record:
    """The rows of a run by their keys.

    Args:
        identity: what the figures depend on, as plain values. folder: where PARTIAL lies and is written after
            each row; one of the same identity is gone on with, any other is kept under another name. None = memory
            alone. notify: told of what is kept, and why.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        folder: Path | None,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.identity: dict[str, Any] = json.loads(json_text(identity, indent=0))
        self.path = None if folder is None else folder / PARTIAL
        self.rows: dict[Key, Row] = {}
        self.points: dict[tuple[str, float], dict[str, Any]] = {}
        if self.path is not None and self.path.is_file():
            self._read(self.path, notify)

    def _read(self, path: Path, notify: Callable[[str], None]) -> None:
        """Take over the rows of an interrupted run, or put its file aside."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            other = _differing(content["identity"], self.identity)
            rows = [row_from_dict(values) for values in content["rows"]]
            points = {(p["method"], float(p["asked"])): p for p in content["points"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            notify(f"{path} is no record of a run ({error!r}); kept as {_put_aside(path)}")
            return
        if other:
            names = ", ".join(other)
            notify(
                f"{path} is of a run with other {names}; its {len(rows)} rows are kept as {_put_aside(path)}"
            )
            return
        self.rows, self.points = {row.key: row for row in rows}, points
        notify(f"{len(rows)} rows of an interrupted run are kept")

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows[row.key] = row
        self._write()

    def add_point(self, point: Point) -> None:
        """Keep how a point came about."""
        key = (point.method, float(point.asked))
        content = {"method": point.method, "asked": float(point.asked), **point.details}
        if "each" in content:
            # Of an interrupted run there may be other subjects already.
            entries = [*self.points.get(key, {}).get("each", ()), *content["each"]]
            content["each"] = list({(e["part"], e["subject"]): e for e in entries}.values())
        self.points[key] = content

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "identity": self.identity, **self.to_dict()}
        new = self.path.with_suffix(".new")
        new.write_text(json_text(content, indent=1), encoding="utf-8")
        os.replace(new, self.path)

    def to_dict(self) -> dict[str, Any]:
        """{"points": [...], "rows": [...]} as plain values, in the order in which they were measured."""
        return {
            "points": list(self.points.values()),
            "rows": [row.to_dict() for row in self.rows.values()],
        }

    def discard(self) -> None:
        """Remove the partial file: its rows are now in the results."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two identities differ in; of the options each by its name."""
    flat = [{**identity, **identity["options"], "options": None} for identity in (one, other)]
    names = sorted(flat[0].keys() | flat[1].keys())
    return [name for name in names if flat[0].get(name) != flat[1].get(name)]


def _put_aside(path: Path) -> Path:
    """Give a file the first free name with a number, and return it."""
    number = 1
    while (aside := path.with_suffix(f".{number}.json")).exists():
        number += 1
    os.rename(path, aside)
    return aside
