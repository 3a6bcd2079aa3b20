"""Commands that `gpu_check` runs, each a step of it: the build, tests on the device, tools of compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexidepth.cli.common import say

from .deadline import Deadline

_ROOT = Path(__file__).resolve().parents[2]
# Tools of compute-sanitizer, and of each what tests it runs: a few small ones of a kind, since they are slow.
_SANITIZERS: dict[str, tuple[str, ...]] = {
    "memcheck": (
        "linear_accumulates and dtype1",
        "one_query and 15-9-3-64",
        "a_prompt and 63-3-1-64",
        "plain_layer and cache_dtype1-dtype1",
        "cpus_tokens and top_k and top_p",
    ),
    "racecheck": (
        "linear_accumulates and dtype1",
        "compaction and 64",
        "one_query and 15-9-3-64-dtype1",
        "a_prompt and 63-3-1-64-dtype1",
        "cpus_tokens and 1500 and top_k and top_p",
    ),
}
_SANITIZED_FILES = [
    f"tests/cuda/test_{name}.py"
    for name in ("products", "attention", "project", "sample", "small_ops")
]
# What torch asks the driver on its way is no fault of ours; each tensor an allocation of its own, and room between
# them, or what is read behind one would be the next.
_SANITIZER_OPTIONS = {"memcheck": ["--report-api-errors", "no", "--padding", "256"]}
_SANITIZER_ENV = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}
_SANITIZER_SECONDS = 120
_PERSISTENT = "FLEXIDEPTH_CUDA_PERSISTENT"
_ENGINE_FILES = [f"tests/cuda/test_{name}.py" for name in ("engine", "decode", "generate")]
# Of kernels whose blocks wait for each other, which could be for ever.
_PERSISTENT_FILES = ("tests/cuda/test_persistent.py", "tests/cuda/test_choice.py")
_DRAWS = (
    "tests/cuda/test_sample.py"  # by blocks that wait, where they may; by one each among the ops
)
_NO_PERSISTENT = "persistent passes are left out of checks and timings"
# Files of tests/cuda that have nothing of a device: they are for every machine, and passed before.
_NO_DEVICE_FILES = [
    f"tests/cuda/test_{name}.py"
    for name in (
        *("broken_device", "costs", "device", "emulation", "engine_check", "engine_peers"),
        *("objects", "predictions", "runtime", "sanitized", "targets", "whole_float32"),
    )
]
_PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=60"]
_PYTEST += ["-o", "faulthandler_timeout=30"]  # a test that hangs is named
# More of pytest's where its plug-ins are installed. A test that hangs, or that leaves the device unusable for its
# process (tests/cuda/broken_device.py), ends a worker, and another one goes on; by files it would begin with that
# test again.
_PLUGINS = {
    "pytest_timeout": ["--timeout=40", "--timeout-method=thread"],
    "xdist": ["-n", "4", "--dist", "load", "--max-worker-restart=50"],
}
_ON_DEVICE = {"FLEXIDEPTH_TEST_DEVICE": "cuda", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
_UNSUPPORTED = "device not supported"  # by compute-sanitizer
_END = 10.0  # seconds that a command takes to end
MOST_KEPT = 20_000  # characters of a step's output, from its end
_FIRST_KEPT = 3000  # characters of the first failure
_FAILURES = re.compile(r"^=+ (?:FAILURES|ERRORS) =+$", re.MULTILINE)
_SUMMARY = re.compile(r"^=*\s*(\d+ (?:passed|failed|error).*?)\s*=*$", re.MULTILINE)


@dataclass
class Step:
    """A part of the check. ok: None = left out, and `said` says why. output: the end of what a command printed.
    first_failure: how the first test that failed begins to be told, where tests failed."""

    name: str
    ok: bool | None
    seconds: float
    said: str
    output: str = ""
    first_failure: str = ""


@dataclass(frozen=True)
class Bounds:
    """What every step keeps to: the time that is left for all, and the folder that gets whole outputs."""

    deadline: Deadline = field(default_factory=Deadline)
    logs: Path | None = None


def run_step(
    name: str,
    command: Sequence[str],
    seconds: float,
    env: Mapping[str, str] | None = None,
    *,
    late: bool | None = False,
    bounds: Bounds | None = None,
    interrupt: bool = False,
) -> Step:
    """Run a command; its last words, or the summary of its tests, are what it said.

    env: added to the environment. late: what the step is where it takes more than `seconds`, or than what is left:
    failed, or left out. interrupt: whether it then gets a Ctrl-C first, on which pytest tells what failed.
    """
    bounds = bounds or Bounds()
    if bounds.deadline.passed:
        return Step(name, None, 0.0, bounds.deadline.said)
    begin, seconds = time.monotonic(), bounds.deadline.cut(seconds)
    try:
        status, output = _run(command, seconds, env or {}, interrupt)
    except OSError as error:
        return Step(name, False, time.monotonic() - begin, f"{command[0]}: {error.strerror}")
    _log(bounds.logs, name, output)
    found = _SUMMARY.findall(output)
    said = found[-1] if found else "".join(output.strip().splitlines()[-1:])
    if status is None:
        last = f"; its last words: {said}" if said else ""
        said = f"took more than {seconds:.0f} s{last}"
    if status != 0:
        say(output[-3000:])
    ok = late if status is None else status == 0
    failures = _FAILURES.search(output) if status != 0 else None
    first = output[failures.start() :][:_FIRST_KEPT] if failures else ""
    return Step(name, ok, time.monotonic() - begin, cell(said), output[-MOST_KEPT:], first)


def _log(folder: Path | None, name: str, output: str) -> None:
    """The whole of an output, for what a report has no room for."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{'_'.join(name.split())}.txt").write_text(output, encoding="utf-8")
    except OSError as error:  # a full disk ends nothing
        say(f"{name}: output not kept: {error.strerror}")


def _run(
    command: Sequence[str], seconds: float, env: Mapping[str, str], interrupt: bool
) -> tuple[int | None, str]:
    """Exit status and output. Status None: it ran out of its time, and was ended with all that it had started."""
    status = None
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds)
            if status is None and interrupt:
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END)
        finally:  # Ctrl-C too
            if status is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # a driver may keep it
                    process.wait(_END)
        output.seek(0)
        return status, output.read().decode("utf-8", errors="replace")


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.split()).replace("|", "/")


def _pytest() -> list[str]:
    """With the plug-ins that are there."""
    found = [name for name in _PLUGINS if importlib.util.find_spec(name) is not None]
    return [*_PYTEST, *(option for name in found for option in _PLUGINS[name])]


def build_step(bounds: Bounds | None = None) -> Step:
    """Build for the devices of this machine; a machine without a network waits for none."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "-e",
        ".",
    ]
    return run_step("build", command, 300, {"FLEXIDEPTH_CUDA": "ON"}, bounds=bounds)


def test_steps(bounds: Bounds | None = None) -> Iterator[Step]:
    """The ops' tests on the device. Left to --engine are those of whole models and of persistent passes."""
    others = (*_NO_DEVICE_FILES, *_ENGINE_FILES, *_PERSISTENT_FILES)
    command = [*_pytest(), *(f"--ignore={path}" for path in others), "tests/cuda"]
    env = {**_ON_DEVICE, _PERSISTENT: "0"}
    yield run_step("tests on the device", command, 240, env, bounds=bounds, interrupt=True)


def sanitizer_steps(bounds: Bounds | None = None) -> Iterator[Step]:
    """Some of the ops' tests under compute-sanitizer."""
    sanitizer = shutil.which(
        "compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    )
    for tool, tests in _SANITIZERS.items():
        if sanitizer is None:
            yield Step(tool, None, 0.0, "compute-sanitizer was not found")
        else:
            yield _sanitizer_step(sanitizer, tool, " or ".join(tests), bounds)


def _sanitizer_step(sanitizer: str, tool: str, tests: str, bounds: Bounds | None) -> Step:
    """Left out where the tool does not know the device, or is too slow on it. One process: the tool slows each."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += _SANITIZER_OPTIONS.get(tool, [])
    command += [sys.executable, "-m", "pytest", "-q", *_SANITIZED_FILES, "-k", tests]
    env = {**_ON_DEVICE, **_SANITIZER_ENV.get(tool, {})}
    step = run_step(tool, command, _SANITIZER_SECONDS, env, late=None, bounds=bounds)
    refused = [line for line in step.output.splitlines() if _UNSUPPORTED in line.lower()]
    return replace(step, ok=None, said=cell(refused[0])) if refused else step


def engine_test_steps(bounds: Bounds | None = None) -> Iterator[Step]:
    """The engine's tests on the device; those of persistent passes by themselves, since they could hang."""
    many = {**_ON_DEVICE, _PERSISTENT: "0"}
    command = [*_pytest(), *_ENGINE_FILES]
    yield run_step("tests on the device", command, 240, many, bounds=bounds, interrupt=True)
    name = "tests of persistent passes"
    if not persistent_allowed():
        yield Step(name, None, 0.0, f"{_PERSISTENT} is 0; {_NO_PERSISTENT}")
        return
    command = [*_pytest(), *_PERSISTENT_FILES, _DRAWS]
    step = run_step(name, command, 90, _ON_DEVICE, bounds=bounds, interrupt=True)
    if not step.ok:  # nothing is known of them, either, where no time was left
        os.environ[_PERSISTENT] = "0"
        step.said = f"{step.said}; {_NO_PERSISTENT}"
    yield step


def persistent_allowed() -> bool:
    """Whether persistent passes may run in this process."""
    return os.environ.get(_PERSISTENT) != "0"
