"""What was built, what can run here, and what is wrong: behind `flexidepth doctor`.

    report = collect()       plain values, ready for json.dumps
    print(render(report))    the same for people
    report["ok"]             False if something stands in the way; report["problems"] says what

Needs neither torch nor the compiled module, so that it can name them as the problem.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from flexidepth_ext import build_info


def collect() -> dict[str, Any]:
    """The report of `flexidepth_ext.build_info` with the default model and a list of problems added."""
    report = build_info.collect()
    problems = []
    if report["load_error"] is not None:
        problems.append(
            f"flexidepth_ext._C cannot be loaded: {report['load_error']}; build it with `{report['rebuild']}`"
        )
    elif str(report["cpu"]["chosen"]).startswith("none"):
        problems.append(report["cpu"]["chosen"].removeprefix("none: "))
    problems += _unmet_requirements()
    return {**report, "ok": not problems, "problems": problems, "default_model": _default_model()}


def render(report: dict[str, Any]) -> str:
    """The report as text, problems last, where a reader looks first."""
    lines = [build_info.render(report), ""]
    if (model := report["default_model"]) is not None:
        state = "present" if model["present"] else "fetched at first use"
        lines += [f"{model['name']}: {model['path']} ({state})", ""]
    lines += [f"problem: {problem}" for problem in report["problems"]] or ["no problems found"]
    return "\n".join(lines)


def _default_model() -> dict[str, Any] | None:
    try:
        from .checkpoints.default_model import DEFAULT_MODEL, default_model_path
    except ImportError:  # reading models needs torch; its absence is among the problems already
        return None
    path = default_model_path()
    return {"name": DEFAULT_MODEL, "path": str(path), "present": path.exists()}


def _unmet_requirements() -> list[str]:
    """The package's own requirements that this environment does not meet, extras left out."""
    try:
        wanted = requires("flexidepth") or []
    except PackageNotFoundError:  # used from a source folder
        return []
    return [problem for text in wanted if (problem := _unmet(text)) is not None]


def _unmet(text: str) -> str | None:
    if "extra ==" in text:
        return None
    name = re.split(r"[^\w.-]", text, maxsplit=1)[0]
    fix = f"install it with `pip install '{text}'`"
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{name} is not installed; {text} is wanted; {fix}"
    try:
        from packaging.requirements import Requirement
    except ImportError:  # comes with transformers; its absence says enough
        return None
    if Requirement(text).specifier.contains(found, prereleases=True):
        return None
    return f"{name} {found} is installed; {text} is wanted; {fix}"
