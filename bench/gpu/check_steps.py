"""Commands that `gpu_check` runs, each a step of it: the build, tests on the device, tools of compute-sanitizer."""

from __future__ import annotations

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
from dataclasses import dataclass, replace
from pathlib import Path

from flexidepth.cli.common import say

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
_NO_PERSISTENT = "persistent passes are left out of checks and timings"
_PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=20"]
_PYTEST += ["-o", "faulthandler_timeout=30"]  # a test that hangs is named
_ON_DEVICE = {"FLEXIDEPTH_TEST_DEVICE": "cuda", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
_UNSUPPORTED = "device not supported"  # by compute-sanitizer
_END = 10.0  # seconds that a command takes to end
MOST_KEPT = 20_000  # characters of a step's output, from its end
_SUMMARY = re.compile(r"^=*\s*(\d+ (?:passed|failed|error).*?)\s*=*$", re.MULTILINE)


@dataclass
class Step:
    """A part of the check. ok: None = left out, and `said` says why. output: the end of what a command printed."""

    name: str
    ok: bool | None
    seconds: float
    said: str
    output: str = ""


def run_step(
    name: str,
    command: Sequence[str],
    seconds: float,
    env: Mapping[str, str] | None = None,
    *,
    late: bool | None = False,
) -> Step:
    """Run a command; its last words, or the summary of its tests, are what it said.

    env: added to the environment. late: what the step is where it takes more than `seconds`: failed, or left out.
    """
    begin = time.monotonic()
    try:
        status, output = _run(command, seconds, env or {})
    except OSError as error:
        return Step(name, False, time.monotonic() - begin, f"{command[0]}: {error.strerror}")
    found = _SUMMARY.findall(output)
    said = found[-1] if found else "".join(output.strip().splitlines()[-1:])
    if status is None:
        last = f"; its last words: {said}" if said else ""
        said = f"took more than {seconds:.0f} s{last}"
    if status != 0:
        say(output[-3000:])
    ok = late if status is None else status == 0
    return Step(name, ok, time.monotonic() - begin, cell(said), output[-MOST_KEPT:])


def _run(command: Sequence[str], seconds: float, env: Mapping[str, str]) -> tuple[int | None, str]:
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
        finally:  # Ctrl-C too
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # a driver may keep it
                    process.wait(_END)
        output.seek(0)
        return status, output.read().decode("utf-8", errors="replace")


def cell(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.split()).replace("|", "/")


def build_step() -> Step:
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
    return run_step("build", command, 300, {"FLEXIDEPTH_CUDA": "ON"})


def test_steps() -> Iterator[Step]:
    """The ops' tests on the device. Left to --engine are those of persistent passes; the compiler's code, which
    test_objects reads, is no result of a device."""
    left_out = [f"--ignore={path}" for path in ("tests/cuda/test_objects.py", *_PERSISTENT_FILES)]
    command = [*_PYTEST, *left_out, "tests/cuda"]
    yield run_step("tests on the device", command, 240, {**_ON_DEVICE, _PERSISTENT: "0"})


def sanitizer_steps() -> Iterator[Step]:
    """Some of the ops' tests under compute-sanitizer."""
    sanitizer = shutil.which(
        "compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin"
    )
    for tool, tests in _SANITIZERS.items():
        if sanitizer is None:
            yield Step(tool, None, 0.0, "compute-sanitizer was not found")
        else:
            yield _sanitizer_step(sanitizer, tool, " or ".join(tests))


def _sanitizer_step(sanitizer: str, tool: str, tests: str) -> Step:
    """Left out where the tool does not know the device, or is too slow on it. One process: the tool slows each."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += _SANITIZER_OPTIONS.get(tool, [])
    command += [sys.executable, "-m", "pytest", "-q", *_SANITIZED_FILES, "-k", tests]
    env = {**_ON_DEVICE, **_SANITIZER_ENV.get(tool, {})}
    step = run_step(tool, command, _SANITIZER_SECONDS, env, late=None)
    refused = [line for line in step.output.splitlines() if _UNSUPPORTED in line.lower()]
    return replace(step, ok=None, said=cell(refused[0])) if refused else step


def engine_test_steps() -> Iterator[Step]:
    """The engine's tests on the device; those of persistent passes by themselves, since they could hang."""
    many = {**_ON_DEVICE, _PERSISTENT: "0"}
    yield run_step("tests on the device", [*_PYTEST, *_ENGINE_FILES], 240, many)
    name = "tests of persistent passes"
    if not persistent_allowed():
        yield Step(name, None, 0.0, f"{_PERSISTENT} is 0; {_NO_PERSISTENT}")
        return
    step = run_step(name, [*_PYTEST, *_PERSISTENT_FILES], 90, _ON_DEVICE)
    if step.ok is False:
        os.environ[_PERSISTENT] = "0"
        step.said = f"{step.said}; {_NO_PERSISTENT}"
    yield step


def persistent_allowed() -> bool:
    """Whether persistent passes may run in this process."""
    return os.environ.get(_PERSISTENT) != "0"
