"""`gpu_check` loses nothing: what fails is told, and everything else is measured and written all the same."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from bench import gpu_check
from bench.gpu import check_report, check_steps, engine_run, ops_run
from bench.gpu.cases import OpCase, Shape, op_cases, router_case
from bench.gpu.check_report import Report, markdown
from bench.gpu.check_steps import Step
from bench.gpu.costs import CostRow
from bench.gpu.deadline import Deadline
from bench.gpu.engine_check import EngineCheck
from bench.gpu.engine_report import EngineReport, check_lines
from bench.gpu.layer_cases import layer_cases
from bench.gpu.timing import OpRow
from bench.models import model_config
from flexidepth_ext.cuda_ops import CudaOps

PERSISTENT = "FLEXIDEPTH_CUDA_PERSISTENT"
ROW = OpRow("linear", "[2, 3]", 1, 5.0, 0.1, 1.0, 200.0, 0.2, "", None)
GOOD = EngineCheck("tiny", "bfloat16", 0.1, 0.1, 0.1, 1.0, True, True, None)


@dataclass
class Machine:
    """A machine whose every command is answered. failing: words of commands that fail."""

    out: Path
    failing: tuple[str, ...] = ()
    commands: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)

    def step(self, name: str, command: Any, *_: Any, **__: Any) -> Step:
        words = " ".join(command)
        self.commands.append(words)
        self.events.append(name)
        failed = any(word in f"{name} {words}" for word in self.failing)
        return Step(name, not failed, 1.0, "1 failed" if failed else "9 passed")

    def time_ops(
        self, shape: Shape, _: float, __: Any, found: list[OpRow], save: Any, **___: Any
    ) -> tuple[bool, str]:
        self.events.append(f"ops of {shape.name}")
        found.append(ROW)
        return True, "1 timed"

    def run_engine(self, names: Any, bandwidth: float, *rest: Any, **options: Any) -> None:
        self.events.append("engine")
        self.engine = {"bandwidth": bandwidth, **options}
        *_, checks, reports, save = rest
        checks.append(GOOD)
        reports.append(EngineReport("tiny", False, 2))
        save()

    def check(self, *arguments: str) -> Any:
        """Run the command; its result."""
        app = typer.Typer()
        app.command()(gpu_check.main)
        return CliRunner().invoke(app, ["--output-dir", str(self.out), *arguments])

    @property
    def written(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "gpu_check.json").read_text())
        return content

    def found(self, name: str) -> dict[str, Any]:
        """A step as it was written."""
        (step,) = (step for step in self.written["steps"] if step["name"] == name)
        return step  # type: ignore[no-any-return]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "out")
    monkeypatch.setenv(PERSISTENT, "")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name, value in {
        "_check_device": lambda _: None,
        "describe_machine": dict,
        "copy_bandwidth": lambda: 2e12,
        "measure_costs": lambda *_: [CostRow("read", "GB/s", 2e3, 1e3, 3e3)],
    }.items():
        monkeypatch.setattr(gpu_check, name, value)
    monkeypatch.setattr(check_steps, "run_step", made.step)
    monkeypatch.setattr(engine_run, "run", made.run_engine)
    monkeypatch.setattr(ops_run, "run", made.time_ops)
    monkeypatch.setattr(check_steps.shutil, "which", lambda *_, **__: "/x/compute-sanitizer")
    return made


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no such | thing")


def test_failing_tests_keep_no_op_from_being_timed(machine: Machine) -> None:
    machine.failing = ("pytest",)
    result = machine.check()
    assert result.exit_code == 1, result.output
    assert list(machine.written["rows"]) == ["Llama-3-8B", "SmolLM2-135M"]
    assert all(rows for rows in machine.written["rows"].values())
    assert not machine.written["ok"] and machine.written["bandwidth"] == 2e12
    assert machine.found("tests on the device")["ok"] is False
    assert "| tests on the device | FAILED | 1 | 1 failed |" in result.output
    assert machine.events == [  # the slow tools last
        *("build", "tests on the device", "ops of Llama-3-8B", "ops of SmolLM2-135M"),
        *("memcheck", "racecheck"),
    ]


def test_failing_tests_keep_no_model_from_being_timed(machine: Machine) -> None:
    machine.failing = ("test_engine.py",)
    assert machine.check("--engine").exit_code == 1
    assert machine.written["engines"] and machine.written["checks"] and machine.written["costs"]
    assert machine.engine["persistent"] and machine.engine["bandwidth"] == 2e12
    assert "memcheck" not in machine.events


def test_a_failed_build_ends_it(machine: Machine) -> None:
    machine.failing = ("build",)
    assert machine.check().exit_code == 1
    assert machine.events == ["build"] and [s["name"] for s in machine.written["steps"]] == [
        "build"
    ]


def test_all_is_good(machine: Machine) -> None:
    for arguments in ([], ["--engine"], ["--no-build", "--no-tests"]):
        assert machine.check(*arguments).exit_code == 0
        assert machine.written["ok"]


def test_what_tests_run_on_a_device(machine: Machine) -> None:
    machine.check()
    (command,) = (c for c in machine.commands if c.endswith(" tests/cuda"))
    for name in ("objects", "persistent", "choice", "engine", "decode", "generate"):
        assert f"--ignore=tests/cuda/test_{name}.py" in command
    assert " -x" not in command


def test_what_is_left_out_on_a_device_has_nothing_of_one() -> None:
    """Every file of tests/cuda whose tests take no fixture of a device, and no other."""

    def takes_a_device(path: Path) -> bool:
        functions = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        ]
        return any(a.arg in ("ops", "make") for f in functions for a in f.args.args)

    files = sorted((check_steps._ROOT / "tests/cuda").glob("test_*.py"))
    without = [f"tests/cuda/{path.name}" for path in files if not takes_a_device(path)]
    assert sorted(check_steps._NO_DEVICE_FILES) == without


def test_tests_have_the_plugins_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_steps.importlib.util, "find_spec", lambda name: None)
    assert check_steps._pytest() == check_steps._PYTEST
    monkeypatch.setattr(check_steps.importlib.util, "find_spec", lambda name: name)
    words = " ".join(check_steps._pytest())
    assert "--timeout=40 --timeout-method=thread" in words
    assert "-n 4 --dist load --max-worker-restart=50" in words


def test_every_term_of_a_sanitizer_has_tests() -> None:
    terms = sorted({term for terms in check_steps._SANITIZERS.values() for term in terms})
    code = (
        "import pytest, sys\n"
        "collect = ['--collect-only', '-q', '-p', 'no:cacheprovider', *sys.argv[1].split()]\n"
        "none = [t for t in sys.argv[2:] if pytest.main([*collect, '-k', t]) != 0]\n"
        "sys.exit(f'no tests: {none}' if none else 0)\n"
    )
    command = [sys.executable, "-c", code, " ".join(check_steps._SANITIZED_FILES), *terms]
    env = {"FLEXIDEPTH_TEST_DEVICE": "cuda", "PYTHONPATH": os.pathsep.join(sys.path)}
    step = check_steps.run_step("collect", command, 300, env)
    assert step.ok, step.output
    # A few of each: they are slow.
    counts = [int(n) for n in re.findall(r"^(\d+)/\d+ tests collected", step.output, re.MULTILINE)]
    assert len(counts) == len(terms) and max(counts) <= 4, counts


def test_what_a_sanitizer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[str, Any]] = {}

    def step(name: str, command: Any, _: float, env: Any, **__: Any) -> Step:
        seen[name] = " ".join(command), env
        return Step(name, True, 1.0, "9 passed")

    monkeypatch.setattr(check_steps, "run_step", step)
    monkeypatch.setattr(check_steps.shutil, "which", lambda *_, **__: "/x/compute-sanitizer")
    assert [step.ok for step in check_steps.sanitizer_steps()] == [True, True]
    memory, memory_env = seen["memcheck"]
    assert "--report-api-errors no --padding 256" in memory and "plain_layer" in memory
    assert memory_env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    races, races_env = seen["racecheck"]
    assert "--padding" not in races and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in races_env
    for command in (memory, races):
        assert " -n " not in command and "linear_accumulates" in command and " or " in command


def test_sanitizers_can_be_left_out(machine: Machine) -> None:
    assert machine.check("--no-sanitizers").exit_code == 0
    assert "tests on the device" in machine.events and "memcheck" not in machine.events


@pytest.mark.parametrize("way", ["ops", "engine"])
def test_what_no_time_is_left_for_is_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.undo()  # of the machine nothing but its folder
    monkeypatch.setenv(PERSISTENT, "")
    for name in ("get_device_name", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, lambda: (9, 0))
    for name, value in {"_check_device": lambda _: None, "describe_machine": dict}.items():
        monkeypatch.setattr(gpu_check, name, value)
    monkeypatch.setattr(gpu_check, "copy_bandwidth", lambda: 2e12)
    runtime = SimpleNamespace(can_overlap=False, device=torch.device("cpu"))
    monkeypatch.setattr(engine_run.run, "__kwdefaults__", {
        **engine_run.run.__kwdefaults__, "make_runtime": lambda: runtime
    })  # fmt: skip
    monkeypatch.setattr(check_steps.shutil, "which", lambda *_, **__: "/x/compute-sanitizer")
    result = machine.check("--deadline", "0", *(["--engine"] if way == "engine" else []))
    assert result.exit_code == 0, result.output
    said = "left out: nothing is left of the 0 s of --deadline"
    left = {step["name"] for step in machine.written["steps"] if step["ok"] is None}
    named = {step["name"] for step in machine.written["steps"] if said in step["said"]}
    tests = {"build", "tests on the device"}
    if way == "ops":
        tests |= {"ops, llama-3-8b", "ops, smollm2-135m", "memcheck", "racecheck"}
    else:
        tests |= {"tests of persistent passes", "costs of mechanisms", "engine"}
        assert [check["ok"] for check in machine.written["checks"]] == [None] * 4
        first, *_ = machine.written["engines"]
        assert first["left_out"] == [said, f"peers: {said}"]
        assert f"| tiny | bfloat16 | | | | | | | {said} | left out |" in result.output
    assert left == named == tests


def test_a_step_gets_what_is_left_and_keeps_its_whole_output(tmp_path: Path) -> None:
    bounds = check_steps.Bounds(Deadline(4), tmp_path / "logs")
    code = f"import time; print('x' * {check_steps.MOST_KEPT + 9}, flush=True); time.sleep(60)"
    step = check_steps.run_step("a b", [sys.executable, "-c", code], 50, bounds=bounds)
    assert step.ok is False and step.said.startswith("took more than 4 s")
    assert len(step.output) == check_steps.MOST_KEPT
    kept = (tmp_path / "logs" / "a_b.txt").read_text()
    assert len(kept.strip()) == check_steps.MOST_KEPT + 9
    late = check_steps.run_step("c", [sys.executable, "-c", ""], 50, bounds=bounds)
    assert late.ok is None and late.said == bounds.deadline.said


def test_an_output_that_cannot_be_kept_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    bounds = check_steps.Bounds(logs=tmp_path / "logs")
    assert check_steps.run_step("a", [sys.executable, "-c", "print(1)"], 50, bounds=bounds).ok


def test_tests_that_run_out_of_time_tell_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time\ndef test_a(): assert 1 == 2\ndef test_b(): time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    step = check_steps.run_step("x", command, 12, interrupt=True)
    assert step.ok is False
    assert step.said.startswith("took more than 12 s; its last words: 1 failed")
    assert step.first_failure.startswith("=") and "assert 1 == 2" in step.first_failure
    report = Report("a device", "9.0", {}, "python x", [step])
    assert "## First failure of x" in markdown(report) and "assert 1 == 2" in markdown(report)


@pytest.mark.parametrize("way", ["ops", "engine"])
def test_an_exception_fails_a_step_and_no_other(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(gpu_check, "copy_bandwidth", refuse)
    monkeypatch.setattr(gpu_check, "measure_costs", refuse)
    timed = machine.time_ops
    monkeypatch.setattr(
        ops_run, "run", lambda s, *a, **o: refuse() if s.heads == 32 else timed(s, *a, **o)
    )
    result = machine.check(*(["--engine"] if way == "engine" else []))
    assert result.exit_code == 1
    said = "stopped: RuntimeError: no such / thing"
    names = {
        "ops": ("bandwidth of a copy", "ops, llama-3-8b"),
        "engine": ("bandwidth of a copy", "costs of mechanisms"),
    }
    for name in names[way]:
        assert (machine.found(name)["ok"], machine.found(name)["said"]) == (False, said)
    if way == "ops":
        assert machine.written["rows"]["SmolLM2-135M"] and machine.found("ops, smollm2-135m")["ok"]
    else:
        assert machine.written["engines"] and machine.engine["bandwidth"] == float("inf")


def test_an_engine_that_stops_is_a_failed_step(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_run, "run", refuse)
    assert machine.check("--engine").exit_code == 1
    assert not machine.found("engine")["ok"] and machine.written["costs"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_was_measured_is_written_before_it_is_stopped(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def stopped(*arguments: Any, **_: Any) -> None:
        found = arguments[3]
        found.append(ROW)
        raise stop

    monkeypatch.setattr(ops_run, "run", stopped)
    result = machine.check()
    assert result.exit_code == 130 or stop is SystemExit
    assert machine.written["rows"] == {"Llama-3-8B": [ROW.to_dict()]}
    assert f"stopped: {stop.__name__}:" in machine.found("the rest")["said"]
    assert not machine.written["ok"] and "# CUDA kernels on a device" in result.output
    assert "| linear | [2, 3] |" in (machine.out / "gpu_check.md").read_text()


def test_it_is_written_as_results_come(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed writes no more."""
    seen: dict[str, Any] = {}

    def noted(what: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            file = machine.out / "gpu_check.json"
            name = what or arguments[0]
            seen.setdefault(name, json.loads(file.read_text()) if file.exists() else None)
            return function(*arguments, **options)

        return call

    def names(what: str) -> list[str]:
        return [step["name"] for step in seen[what]["steps"]]

    monkeypatch.setattr(check_steps, "run_step", noted("", machine.step))
    monkeypatch.setattr(gpu_check, "measure_costs", noted("costs", lambda *_: []))

    monkeypatch.setattr(gpu_check, "copy_bandwidth", noted("bandwidth", lambda: 2e12))
    monkeypatch.setattr(ops_run, "run", noted("ops", machine.time_ops))
    monkeypatch.setattr(engine_run, "run", noted("engine", machine.run_engine))
    machine.check()
    assert seen["build"] is None and names("tests on the device") == ["build"]
    assert names("bandwidth") == ["build", "tests on the device"]
    assert seen["ops"]["bandwidth"] == 2e12
    assert len(seen["memcheck"]["rows"]) == 2 and names("racecheck")[-1] == "memcheck"
    machine.check("--engine")
    assert names("tests of persistent passes")[-1] == "tests on the device"
    assert seen["costs"]["bandwidth"] == 2e12 and names("engine")[-1] == "costs of mechanisms"


def test_a_report_that_cannot_be_written_now_may_be_later(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = gpu_check.write_report, [0]

    def full(*arguments: Any) -> Any:
        calls[0] += 1
        return refuse() if calls[0] < 3 else write(*arguments)

    monkeypatch.setattr(gpu_check, "write_report", full)
    assert machine.check().exit_code == 0 and machine.written["rows"]


@pytest.mark.parametrize("ok", [True, False])
def test_persistent_tests_that_fail_keep_persistent_passes_out(machine: Machine, ok: bool) -> None:
    machine.failing = () if ok else ("test_persistent.py",)
    result = machine.check("--engine")
    assert result.exit_code == (0 if ok else 1)
    others, own = (c for c in machine.commands if "pytest" in c)
    assert "test_engine.py" in others and "persistent" not in others and "choice" not in others
    assert "test_persistent.py" in own and "test_choice.py" in own
    assert machine.engine["persistent"] is ok
    assert (os.environ[PERSISTENT] == "0") is not ok
    said = machine.found("tests of persistent passes")["said"]
    assert ("persistent passes are left out of checks and timings" in said) is not ok
    assert said in result.output


def test_whoever_wants_no_persistent_passes_gets_none(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PERSISTENT, "0")
    assert machine.check("--engine").exit_code == 0
    assert not any("test_persistent.py" in command for command in machine.commands)
    assert machine.engine["persistent"] is False
    assert machine.found("tests of persistent passes")["ok"] is None


def test_no_persistent_variant_is_timed_where_there_is_to_be_none() -> None:
    config, runtime = model_config("tiny"), SimpleNamespace(can_overlap=True)
    assert engine_run._variants(config, runtime, True) == [
        (False, False), (True, False), (False, True)
    ]  # fmt: skip
    assert engine_run._variants(config, runtime, False) == [(False, False), (True, False)]


def sanitizer(folder: Path, script: str) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "ok", "said"),
    [
        ("echo '==== Device not supported.'; echo '9 passed in 1s'", None, "Device not supported."),
        ("echo '=== Error: device not supported | x' >&2; exit 1", None, "not supported / x"),
        ("echo last; sleep 60", None, "took more than 1 s; its last words: last"),
        ("echo '1 failed in 1s'; exit 9", False, "1 failed in 1s"),
        ("echo '== 9 passed in 1s =='", True, "9 passed in 1s"),
    ],
)
def test_a_sanitizer_that_cannot_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, ok: bool | None, said: str
) -> None:
    monkeypatch.setattr(check_steps, "_SANITIZER_SECONDS", 1 if "sleep" in script else 60)
    monkeypatch.setattr(check_steps, "_SANITIZERS", {"memcheck": ("x",)})
    path = sanitizer(tmp_path, script)
    monkeypatch.setattr(check_steps.shutil, "which", lambda *_, **__: path)
    (step,) = check_steps.sanitizer_steps()
    assert step.ok is ok and said in step.said
    assert script.split("'")[1] in step.output if "'" in script else "last" in step.output


def test_what_takes_too_long_is_ended_with_all_that_it_started() -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    step = check_steps.run_step("x", [sys.executable, "-c", code], 3)
    assert step.ok is False and step.said.startswith("took more than 3 s; its last words: ")
    pid = int(step.output)
    for _ in range(100):
        if not running(pid):
            break
        time.sleep(0.1)
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_op_that_stops_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(case: OpCase, *_: Any) -> OpRow:
        if case.op == "large":
            raise torch.OutOfMemoryError("no memory")
        return refuse() if case.op == "broken" else replace(ROW, op=case.op)

    cases = [OpCase(name, "w", 1, 1.0, lambda: print) for name in ("a", "broken", "large", "b")]
    monkeypatch.setattr(ops_run, "_cases", lambda *_: [*cases, OpCase("c", "w", 1, 1.0, print)])
    monkeypatch.setattr(ops_run, "time_case", timed)
    found: list[OpRow] = []
    saved: list[int] = []
    ok, said = ops_run.run(
        ops_run.SHAPES["smollm2-135m"], 1e12, [1], found, lambda: saved.append(len(found))
    )
    assert [row.op for row in found] == ["a", "b", "c"] and saved == [1, 1, 1, 2, 3] and not ok
    assert said.startswith("3 timed; too large for the device's memory: large w, 1 rows; ")
    assert "broken w, 1 rows, stopped: RuntimeError: no such / thing" in said


@pytest.mark.parametrize("unusable", [True, False])
def test_behind_an_op_that_ends_its_process_another_goes_on(
    monkeypatch: pytest.MonkeyPatch, unusable: bool
) -> None:
    """Whether the process is gone, or only its device."""
    processes: list[int] = []

    class Gone(Exception):
        pass

    def way(work: Any, arguments: Any, take: Any, *_: float) -> str:
        processes.append(arguments[-1])
        try:
            work(*arguments, take)
        except Gone:
            return "stopped: its process was ended by SIGSEGV"
        return ""

    def timed(case: OpCase, *_: Any) -> OpRow:
        if case.op != "broken":
            return replace(ROW, op=case.op)
        raise RuntimeError("illegal") if unusable else Gone

    monkeypatch.setattr(ops_run, "told", lambda error: refuse_gone(error, Gone))
    monkeypatch.setattr(ops_run, "_unusable", lambda: unusable)
    names = ("a", "broken", "b", "broken", "c")
    cases = [OpCase(name, "w", 1, 1.0, lambda: print) for name in names]
    monkeypatch.setattr(ops_run, "_cases", lambda *_: cases)
    monkeypatch.setattr(ops_run, "time_case", timed)
    found: list[OpRow] = []
    shape = ops_run.SHAPES["smollm2-135m"]
    ok, said = ops_run.run(shape, 1e12, [1], found, lambda: None, way=way)
    assert [row.op for row in found] == ["a", "b", "c"] and not ok
    assert processes == [0, 2, 4] and said.count("broken w, 1 rows, stopped: ") == 2
    assert "the rest" not in said
    cases[:] = [OpCase("broken", "w", 1, 1.0, lambda: print)] * 9
    ok, said = ops_run.run(shape, 1e12, [1], [], lambda: None, way=way)
    assert not ok and said.endswith("the rest: 6 processes ended before it")


def refuse_gone(error: BaseException, gone: type[Exception]) -> str:
    """What an error is told as, unless it stands for the end of a process."""
    if isinstance(error, gone):
        raise error
    return f"stopped: {error}"


def run_engine(**options: Any) -> tuple[list[EngineCheck], list[EngineReport]]:
    checks, reports = list[EngineCheck](), list[EngineReport]()
    runtime = SimpleNamespace(can_overlap=False, device=torch.device("cpu"))
    engine_run.run(
        ["tiny"],
        1e9,
        True,
        lambda _: None,
        checks,
        reports,
        lambda: None,
        make_runtime=lambda: runtime,  # type: ignore[arg-type,return-value]
        **options,
    )
    return checks, reports


def test_an_exception_in_a_check_is_kept_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter([refuse, lambda: GOOD])
    monkeypatch.setattr(engine_run, "check_engine", lambda *_: next(answers)())
    monkeypatch.setattr(engine_run, "_time", lambda report, *_: report.left_out.append("seen"))
    monkeypatch.setattr(engine_run, "time_peers", refuse)
    checks, reports = run_engine(checked=["tiny"])
    said = "stopped: RuntimeError: no such / thing"
    assert [(check.dtype, check.said, check.ok) for check in checks] == [
        ("bfloat16", said, False), ("bfloat16", "", True)
    ]  # fmt: skip
    assert [(r.persistent, r.left_out[0]) for r in reports] == [(False, "seen"), (True, "seen")]
    assert reports[0].left_out[1] == f"peers: {said}"
    report = Report("a device", "9.0", {}, "python x", checks=checks)
    assert f"| tiny | bfloat16 | | | | | | | {said} | FAILED |" in markdown(report)
    assert not report.ok


def test_checks_are_told_whether_persistent_passes_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_run, "_time", lambda *_: None)
    monkeypatch.setattr(engine_run, "time_peers", lambda *_, **__: [])
    seen: list[bool] = []
    monkeypatch.setattr(engine_run, "check_engine", lambda *a: seen.append(a[-1]) or GOOD)
    for allowed in (True, False):
        _, reports = run_engine(checked=["tiny"], persistent=allowed)
        assert any(report.persistent for report in reports) is allowed
    assert seen == [True, True, False, False]


def test_an_engine_that_cannot_be_closed_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[None] = []

    class Engine:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            closed.append(None)
            refuse()

    monkeypatch.setattr(engine_run, "CudaEngine", Engine)
    monkeypatch.setattr(engine_run, "random_weights", lambda *_: [])
    monkeypatch.setattr(engine_run, "time_decode", lambda *_: ["a row"])
    monkeypatch.setattr(engine_run, "time_prefetch", refuse)
    monkeypatch.setattr(engine_run, "time_peers", lambda *_, **__: [])
    _, reports = run_engine(checked=[], persistent=False, contexts=(8,), batches=(1,))
    assert closed and reports[0].decode == ["a row"]
    assert reports[0].said == "stopped: RuntimeError: no such / thing"


@pytest.mark.parametrize("name", ["prompt_error", "token_error", "torch_error", "agreement"])
def test_what_is_not_a_number_is_not_exact(name: str) -> None:
    assert GOOD.ok and not replace(GOOD, **{name: float("nan")}).ok  # type: ignore[arg-type]


def test_a_check_without_persistent_passes() -> None:
    without = replace(GOOD, same_bits=None)
    assert without.ok and not replace(GOOD, same_bits=False).ok
    assert "| alike | left out |" in check_lines([without])[-1]


def test_every_reader_takes_the_json(tmp_path: Path) -> None:
    stopped = EngineCheck.stopped("tiny", torch.bfloat16, "stopped: x")
    check_report.write_report(Report("x", "9.0", {}, "y", checks=[stopped]), tmp_path)
    text = (tmp_path / "gpu_check.json").read_text()
    assert "NaN" not in text and json.loads(text)["checks"][0]["prompt_error"] is None


class NoModule:
    """In place of the compiled module: nothing is computed."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: 0


class Queued(TorchDispatchMode):
    """Which of torch's ops run that are more than room or a view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in ("empty", "new_empty", "empty_like", "slice", "detach", "alias"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_timed_but_the_op() -> None:
    ops, shape = (
        CudaOps(NoModule(), "cpu"),
        Shape("tiny", 32, 48, 4, 2, 8, 70, 6, 16, 300),
    )
    cases = [
        *op_cases(ops, shape, torch.bfloat16, "cpu", (1, 9)),
        *layer_cases(ops, shape, torch.bfloat16, "cpu", (1, 3)),
        router_case(ops, shape, "cpu"),
    ]
    for case in cases:
        run = case.make()
        with Queued() as queued:
            run()
        assert queued.names == [], (case.op, case.what)
