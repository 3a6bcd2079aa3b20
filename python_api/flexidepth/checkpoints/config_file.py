"""Changing the config.json of a checkpoint in place."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SaveError
from .directory_config import read_json
from .partial import sync_one
from .routing_directory import is_routing_directory, routing_content


def check_changeable(directory: Path) -> None:
    """CheckpointError unless this is a directory of this package's own layout, whole or of routers alone."""
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; a checkpoint is changed where it lies"
        )
    kind = read_json(directory / "config.json").get("model_type")
    if kind != "flexidepth":
        raise CheckpointError(
            f"{directory}: its model_type is {kind!r}, whose config.json has no place for it; `flexidepth convert` "
            "makes a directory that has"
        )


def update_config(directory: Path, fields: dict[str, Any]) -> None:
    """Set keys of a checkpoint's config.json, all of them or none: the file is replaced in one step.

    Raises:
        CheckpointError: no config.json, or a malformed one. SaveError: no permission, no space; the old file is
            untouched then.
    """
    # Of a routing checkpoint whose saving was cut short the other configuration counts.
    routing = is_routing_directory(directory)
    path = directory / "config.json"
    content = {**(routing_content(directory) if routing else read_json(path)), **fields}
    partial = directory / f".{path.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        sync_one(partial)
        os.replace(partial, path)
        sync_one(directory)
    except OSError as error:
        raise SaveError(
            f"save: {path} cannot be replaced: {error.strerror or error}; it is untouched; free space or get "
            "permission to write there"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
