"""Every kernel once more under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulation.build import build, build_folder

from .conftest import ON_DEVICE

ROOT = Path(__file__).resolve().parents[2]
# Of each kernel odd sizes, one order of threads.
CHOSEN = (
    "forward and (linear_matches and 33 or gated_mlp and 65 or lm_head or no_live or embed or rms_norm and 33 or "
    "rope_is or gates_are and 36-9 or compaction and 1025 or seconds or gathered or one_query and 15 or several or "
    "plain_layer and 7 or two_calls or joined_phases and 5 or halves_of or cpus_tokens and 1500 and top_k and top_p "
    "or border or faults or two_blocks or rounds_once and 264 or residual_add) or kind_of_model and (wide_heads or "
    "odd_sizes) or number_of_rows and 5 or wait_for_each_other"
)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """For a process that loads the module with sanitizers."""
    if ON_DEVICE:
        pytest.skip("about the emulation, and these tests run on the device")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        result = subprocess.run(
            [os.environ.get("CXX", "g++"), f"-print-file-name={name}"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = result.stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        libraries.append(found)
    module = build(build_folder("emulation-sanitized"), sanitize="address,undefined")
    return {
        **os.environ,
        "FLEXIDEPTH_EMULATED": str(module),
        "LD_PRELOAD": " ".join(libraries),
        # What Python and torch keep to the end is no leak; a fiber's stack is no use after return.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_kernels(environment):
    result = run(["-m", "pytest", "-q", "-x", "tests/cuda", "-k", CHOSEN], environment)
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert "passed" in result.stdout


def test_an_access_behind_shared_memory_is_found_by_line(environment):
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import os, torch\n"
        "from pathlib import Path\n"
        "from tests.emulation.build import load\n"
        "module = load(Path(os.environ['FLEXIDEPTH_EMULATED']))\n"
        "out = torch.zeros(64)\n"
        "module.run_broken('behind_the_end', out.data_ptr(), out.data_ptr())\n"
    )
    result = run(["-c", code], environment)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "broken.cu" in result.stderr and "256-byte region" in result.stderr
