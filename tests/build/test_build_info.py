"""The report: what was built, what can run, and that it survives a module that cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

import flexidepth
from flexidepth import doctor
from flexidepth_ext import build_info, cpu_info

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder in which flexidepth_ext has a compiled module that is not one."""
    shutil.copytree(
        ROOT / "flexidepth_ext",
        tmp_path / "flexidepth_ext",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (tmp_path / "flexidepth_ext" / f"_C{suffix}").write_bytes(b"not a library")
    return tmp_path


def _python(
    *arguments: str, first: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = [str(p) for p in (first, ROOT / "python_api", ROOT) if p is not None]
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=first,
        capture_output=True,
        text=True,
        check=False,
    )


def test_report_of_a_good_build() -> None:
    report = build_info.collect()
    assert report["ok"] and report["load_error"] is None
    assert report["build"]["version"] == report["packages"]["flexidepth"] == version("flexidepth")
    assert set(report["cpu"]["runnable"]) <= set(report["build"]["kernels"].split())
    assert report["cpu"]["chosen"] in report["cpu"]["runnable"]
    assert 1 <= report["threads"]["usable"] <= report["threads"]["affinity"]
    state = report["cuda"]["state"]
    assert state.startswith("CUDA" if report["cuda"]["built"] else "CPU build")
    assert not report["cuda"]["built"] or torch.cuda.is_available() or "cannot be used: " in state
    assert json.loads(json.dumps(report)) == report


def test_report_for_people_names_the_facts() -> None:
    report = build_info.collect()
    text = build_info.render(report)
    facts = [report["build"]["compiler"], report["cuda"]["state"], report["packages"]["torch"]]
    assert [fact for fact in facts if fact not in text] == []


def test_module_exit_code_is_zero_for_a_good_build() -> None:
    result = _python("-m", "flexidepth_ext")
    assert result.returncode == 0, result.stderr
    assert "flexidepth_ext._C" in result.stdout


def test_module_reports_a_broken_build_and_exits_with_one(broken: Path) -> None:
    result = _python("-m", "flexidepth_ext", first=broken)
    assert result.returncode == 1
    assert "CANNOT BE LOADED: ImportError" in result.stdout
    assert "pip install" in result.stdout and "CPU" in result.stdout
    assert result.stderr == ""


def test_module_reports_a_missing_build(broken: Path) -> None:
    next((broken / "flexidepth_ext").glob("_C*.so")).unlink()
    # -S: an editable installation would find the module of the checkout instead
    result = _python("-S", "-m", "flexidepth_ext", first=broken)
    assert result.returncode == 1
    assert "CANNOT BE LOADED: ModuleNotFoundError" in result.stdout
    assert "not installed" in result.stdout


def test_doctor_names_a_broken_build_as_the_problem(broken: Path) -> None:
    code = "import json; from flexidepth.doctor import collect; print(json.dumps(collect()))"
    result = _python("-c", code, first=broken)
    report = json.loads(result.stdout)
    assert not report["ok"] and report["build"] is None
    assert "cannot be loaded" in report["problems"][0] and "pip install" in report["problems"][0]


def test_use_of_a_broken_build_says_how_to_build(broken: Path) -> None:
    result = _python("-c", "from flexidepth_ext import _C", first=broken)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: flexidepth_ext._C cannot be loaded")
    assert "pip install" in last and "python -m flexidepth_ext" in last


def test_errors_can_be_imported_from_a_broken_build(broken: Path) -> None:
    code = "from flexidepth_ext import ShapeError, available; assert not available()"
    assert _python("-c", code, first=broken).returncode == 0


def test_an_extension_that_cannot_be_imported_fails_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not left half made for the next import to find."""
    package = tmp_path / "flexidepth_ext"
    package.mkdir()
    (package / "__init__.py").write_text("half = 1\nraise ImportError('broken')\n")
    monkeypatch.setattr(flexidepth, "__file__", str(tmp_path / "flexidepth" / "__init__.py"))
    monkeypatch.delitem(sys.modules, "flexidepth_ext")
    for _ in range(2):
        with pytest.raises(ImportError, match="broken"):
            flexidepth._import_extension()
        assert "flexidepth_ext" not in sys.modules


def test_report_and_doctor_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from flexidepth import doctor\n"
        "print(doctor.render(doctor.collect()))"
    )
    result = _python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "torch" in result.stdout and "CPU" in result.stdout


def test_threads_obey_the_affinity_mask() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from flexidepth_ext import build_info\n"
        "print(build_info.collect()['threads']['usable'])"
    )
    assert _python("-c", code).stdout.strip() == "1"


def test_doctor_says_when_the_asked_kernels_cannot_run() -> None:
    code = "import json; from flexidepth.doctor import collect; print(json.dumps(collect()))"
    report = json.loads(_python("-c", code, FLEXIDEPTH_ISA="avx9000").stdout)
    assert not report["ok"]
    assert "avx9000" in report["problems"][0] and "FLEXIDEPTH_ISA" in report["problems"][0]


def test_doctor_finds_no_problem_in_this_environment() -> None:
    report = doctor.collect()
    assert report["problems"] == [] and report["ok"]
    assert doctor.render(report).endswith("no problems found")


def test_doctor_names_an_old_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "version", lambda name: "4.40.0" if name == "transformers" else version(name)
    )
    report = doctor.collect()
    assert not report["ok"]
    assert "transformers 4.40.0 is installed; transformers>=" in report["problems"][0]
    assert "problem: transformers 4.40.0" in doctor.render(report)


def test_doctor_names_a_missing_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_numpy(name: str) -> str:
        if name != "numpy":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", only_numpy)
    problems = doctor.collect()["problems"]
    assert problems[0].startswith("torch is not installed; torch>=")
    assert not any(problem.startswith("numpy") for problem in problems)


def test_cgroup_quota_is_the_tightest_of_the_own_group_and_its_parents(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/jobs/one\n", encoding="utf-8")
    group = tmp_path / "cgroup" / "jobs" / "one"
    group.mkdir(parents=True)
    assert cpu_info.cgroup_cpu_quota(tmp_path / "cgroup", own) is None
    (group / "cpu.max").write_text("max 100000\n", encoding="utf-8")
    assert cpu_info.cgroup_cpu_quota(tmp_path / "cgroup", own) is None
    (group / "cpu.max").write_text("400000 100000\n", encoding="utf-8")
    assert cpu_info.cgroup_cpu_quota(tmp_path / "cgroup", own) == 4.0
    (group.parent / "cpu.max").write_text("150000 100000\n", encoding="utf-8")
    assert cpu_info.cgroup_cpu_quota(tmp_path / "cgroup", own) == 1.5


def test_cgroup_quota_of_version_one(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n", encoding="utf-8")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n", encoding="utf-8")
    assert cpu_info.cgroup_cpu_quota(tmp_path, tmp_path / "none") is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n", encoding="utf-8")
    assert cpu_info.cgroup_cpu_quota(tmp_path, tmp_path / "none") == 2.5
