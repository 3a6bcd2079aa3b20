"""Costs of a device's mechanisms, as far as no device is needed: the source compiles, rows and failures are read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import costs
from bench.gpu.costs import (
    SOURCE,
    CostRow,
    compile_costs,
    cost_lines,
    find_nvcc,
    measure_costs,
    parse,
)

# As the program prints it: rows with samples, and rows with what kept them from being measured.
PRINTED = {
    "device": "a device",
    "runtime": 13000,
    "driver": 13000,
    "rows": [
        {"key": "kernel_node", "unit": "us", "said": "", "samples": [1.5, 1.1, 1.2, 9.0, 1.3, 1.25]},
        {"key": "read", "unit": "GB/s", "said": "", "samples": [3000, 3010.5, 2990]},
        {"key": "if_taken", "unit": "us", "said": "IF nodes need CUDA 12.4;\nthe | driver's", "samples": []},
    ],
}  # fmt: skip


def test_rows():
    node, read, branch = parse(json.dumps(PRINTED))
    assert node == CostRow("kernel_node", "us", 1.275, 1.1, 1.5)
    assert (read.median, read.low, read.high) == (3000, 2990, 3010.5)
    assert branch == CostRow(
        "if_taken", "us", None, None, None, "IF nodes need CUDA 12.4; the / driver's"
    )
    assert node.to_dict()["what"] == "kernel node of a graph"


def test_the_table():
    text = "\n".join(cost_lines(parse(json.dumps(PRINTED))))
    assert "| kernel node of a graph | 1.27 | 1.10 to 1.50 | us |" in text
    assert "| reading the device's memory | 3000 | 2990 to 3010 | GB/s |" in text
    assert (
        "| IF node, taken: body of one empty kernel | | | not measured: IF nodes need CUDA" in text
    )


@pytest.mark.parametrize(
    "output",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"rows": [{"key": "read"}]}',
        '{"rows": [{"key": "read", "unit": "us", "samples": ["x"]}]}',
    ],
)
def test_output_that_cannot_be_read(output):
    (row,) = parse(output)
    assert row.median is None and "cannot read its output" in row.said


def program(folder: Path, text: str) -> str:
    """A program written in Python, which stands for nvcc."""
    path = folder / "nvcc"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return str(path)


# Makes a "program" that prints what it is told to.
COMPILES = """import pathlib, sys
assert sys.argv[1:5] == ["-std=c++17", "-O3", "-arch=sm_90", "-o"] and sys.argv[6].endswith("costs.cu")
out = pathlib.Path(sys.argv[5])
out.write_text("#!/bin/sh\\n{body}\\n")
out.chmod(0o755)
"""


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (COMPILES.format(body="echo no driver >&2; exit 1"), "costs: no driver"),
        (COMPILES.format(body="exit 7"), "costs: exit status 7"),
        (
            "import sys; print('x.cu(3): error: no\\n1 error detected', file=sys.stderr); sys.exit(2)",
            "nvcc: x.cu(3): error: no",
        ),
        ("import sys; sys.exit('nvcc fatal: Unsupported gpu')", "nvcc: nvcc fatal: Unsupported gpu"),
        ("import time; time.sleep(60)", "nvcc: took more than 1 s"),
    ],
    ids=["run", "silent", "compile", "old toolkit", "hang"],
)  # fmt: skip
def test_what_goes_wrong_is_a_row(tmp_path, monkeypatch, compiler, said):
    monkeypatch.setenv("CUDACXX", program(tmp_path, compiler))
    seconds = 1.0 if "sleep" in compiler else 60.0
    assert measure_costs((9, 0), seconds) == [CostRow("all", "", None, None, None, said)]


def test_what_the_program_prints_comes_back(tmp_path, monkeypatch):
    (tmp_path / "printed").write_text(json.dumps(PRINTED))
    compiler = COMPILES.format(body=f"cat {tmp_path / 'printed'}")
    monkeypatch.setenv("CUDACXX", program(tmp_path, compiler))
    assert measure_costs((9, 0)) == parse(json.dumps(PRINTED))


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nothing"))
    (row,) = measure_costs((9, 0))
    assert row.median is None and "nvcc was not found" in row.said
    assert "not measured: nvcc was not found" in "\n".join(cost_lines([row]))


def test_every_row_of_the_source_has_words():
    text = SOURCE.read_text(encoding="utf-8")
    plain = set(re.findall(r'add\(\s*(?:overlap \? )?"(\w+)"(?: : "(\w+)")?', text))
    keys = {key for pair in plain for key in pair if key}
    assert {"stream_launch", "if_taken", "copy", "phase", "phase_overlap"} <= keys
    assert {key for key in keys if not key.endswith("_")} <= set(costs._WORDS)


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_the_source_compiles(tmp_path):
    """And, where no device is, what it says of that is a row."""
    nvcc = find_nvcc()
    assert nvcc is not None
    made = tmp_path / "costs"
    compile_costs(nvcc, (9, 0), made)
    result = subprocess.run([made], capture_output=True, text=True, check=False, timeout=120)
    if result.returncode:
        assert "cudaGetDeviceProperties" in result.stderr and result.stdout == ""
    else:
        rows = parse(result.stdout)
        assert {row.key for row in rows} == set(costs._WORDS) - {"all"}
