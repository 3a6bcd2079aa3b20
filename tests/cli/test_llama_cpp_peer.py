"""Converting for llama.cpp: silent when it works, the end of the log when it does not. A stand-in converts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexidepth.bench.peers.llama_cpp import bf16_file
from flexidepth.errors import FlexiDepthError

_STAND_IN = """
import os
LLAMA_FTYPE_MOSTLY_BF16 = 32
class Params: pass
llama_model_quantize_default_params = Params
def llama_model_quantize(source, target, params):
    assert params.ftype == 32 and params.allow_requantize
    for fd in (1, 2):  # as C code writes, past sys.stdout
        for i in range(40):
            os.write(fd, b"[%d] converting to bf16\\n" % i)
    with open(target, "wb") as out:
        out.write(b"half" if b"bad" in source else b"whole")
    if b"crash" in source:
        os.write(2, b"GGML_ASSERT failed\\n")
        os.abort()
    if b"bad" in source:
        os.write(1, b"unknown tensor type\\n")
        return 3
    return 0
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "llama_cpp.py").write_text(_STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))


def source(folder: Path, name: str) -> Path:
    (folder / "models").mkdir()
    path = folder / "models" / f"{name}.gguf"
    path.write_bytes(b"GGUF")
    return path


def test_conversion_is_silent_and_made_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = bf16_file(source(tmp_path, "good"))
    assert made.name == "good.bf16.gguf"
    assert made.read_bytes() == b"whole"
    made.write_bytes(b"kept")
    assert bf16_file(tmp_path / "models" / "good.gguf").read_bytes() == b"kept"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bad", "exit code 1.*unknown tensor type"), ("crash", "exit code -6.*GGML_ASSERT failed")],
)
def test_failure_shows_the_end_of_the_log_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    path = source(tmp_path, name)
    with pytest.raises(FlexiDepthError, match=f"(?s){name}.gguf.*{reason}") as error:
        bf16_file(path)
    assert len(str(error.value).splitlines()) == 6
    assert list(path.parent.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")
