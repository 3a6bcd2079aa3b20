"""llama.cpp through llama-cpp-python, on the same weights converted to bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..timing import Case


def bf16_file(source: Path) -> Path:
    """The GGUF file `source` requantised to bfloat16, made once beside it."""
    import llama_cpp

    target = source.with_suffix(".bf16.gguf")
    if target.exists():
        return target
    partial = source.with_suffix(".bf16.partial")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params)
    if status != 0:
        raise RuntimeError(f"llama.cpp could not convert {source} to bfloat16 (status {status})")
    partial.replace(target)
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
