"""llama.cpp through llama-cpp-python, on the same weights converted to bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flexidepth.errors import FlexiDepthError

from ..timing import Case

_LOG_LINES = 5
_CONVERT = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
params.allow_requantize = True
source, target = (name.encode() for name in sys.argv[1:])
sys.exit(int(llama_cpp.llama_model_quantize(source, target, params)) != 0)
"""


def bf16_file(source: Path) -> Path:
    """The GGUF file `source` requantised to bfloat16, made once beside it.

    Raises:
        ImportError: llama-cpp-python is not installed.
        FlexiDepthError: the conversion failed; says how its log ended. No half file is left.
    """
    import llama_cpp  # noqa: F401  the process below needs it

    target = source.with_suffix(".bf16.gguf")
    if target.exists():
        return target
    partial = source.with_suffix(f".bf16.{os.getpid()}.partial")
    command = [sys.executable, "-c", _CONVERT, str(source), str(partial)]
    try:
        # A process of its own: its log, a line per tensor written from C, is not ours, and an abort in there
        # does not end the benchmark without a word.
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if result.returncode != 0:
            log = result.stdout.decode(errors="replace").strip().splitlines()
            raise FlexiDepthError(
                f"bench: llama.cpp could not convert {source} to bfloat16 (exit code {result.returncode}); wanted "
                f"{target}; leave --peers out, or look at how its log ends:\n"
                + "\n".join(log[-_LOG_LINES:])
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def load(path: Path, threads: int, context: int) -> Any:
    """A llama_cpp.Llama on the CPU."""
    from llama_cpp import Llama

    return Llama(
        str(path),
        n_ctx=context,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=0,
        verbose=False,
    )


def decode_case(model: Any, context: int) -> Case:
    """One token at a time, greedy."""
    import llama_cpp
    import numpy as np

    state = {"token": 5}
    vocab = model.n_vocab()

    def start() -> None:
        model.reset()
        model.eval([5] * context)

    def step() -> None:
        model.eval([state["token"]])
        logits = llama_cpp.llama_get_logits(model.ctx)
        state["token"] = int(np.ctypeslib.as_array(logits, shape=(vocab,)).argmax())

    return Case("llama.cpp bf16", step, start)


def prompt_case(model: Any, tokens: int) -> Case:
    """A whole prompt."""
    import numpy as np

    ids = np.random.default_rng(0).integers(0, model.n_vocab(), tokens).tolist()

    def step() -> None:
        model.reset()
        model.eval(ids)

    return Case("llama.cpp bf16", step)
