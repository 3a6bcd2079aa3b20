"""What was built, what can run here, and what is wrong: behind `flexidepth doctor`.

    report = collect()       plain values, ready for json.dumps
    print(render(report))    the same for people
    report["ok"]             False if something stands in the way; report["problems"] says what

Needs neither torch nor the compiled module, so that it can name them as the problem.
"""

from __future__ import annotations

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
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in requires("flexidepth") or []]
    except (
        PackageNotFoundError,
        ImportError,
    ):  # used from a source folder, or nothing is installed
        return []
    problems = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        fix = f"install it with `pip install '{requirement}'`"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed; {requirement} is wanted; {fix}")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(
                f"{requirement.name} {found} is installed; {requirement} is wanted; {fix}"
            )
    return problems
