"""llama.cpp through llama-cpp-python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import PeerUnavailable, Session, short_name
from .files import FilePeer
from .gguf_export import write_base_gguf

_BATCH = 512  # rows of a prompt at a time, as llama-bench


class LlamaCppSession(Session):
    """Timed: `Llama.eval` of a token, and numpy's argmax over the logits."""

    def __init__(self, path: str, positions: int, threads: int, gpu_layers: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            path,
            n_ctx=positions,
            n_batch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=gpu_layers,
            verbose=False,
        )

    def start(self, ids: Sequence[int]) -> int:
        self.model.reset()
        return self._read(ids)

    def step(self) -> int:
        return self._read([self.token])

    def _read(self, ids: Sequence[int]) -> int:
        import llama_cpp
        import numpy as np

        self.model.eval(ids)
        logits = llama_cpp.llama_get_logits(self.model.ctx)
        values = np.ctypeslib.as_array(logits, shape=(self.model.n_vocab(),))
        self.token = int(values.argmax())
        return self.token

    def close(self) -> None:
        self.model.close()


class LlamaCpp(FilePeer):
    """The base model as a GGUF file in the engine's type; on CUDA all layers are on the device."""

    title = "llama.cpp"
    package = "llama-cpp-python"
    module = "llama_cpp"
    extra = "peers"
    session = LlamaCppSession

    @property
    def short_precision(self) -> str:
        """llama.cpp's word for the file."""
        return short_name(self.setup.dtype)

    @property
    def precision(self) -> str:
        """The cache is llama.cpp's default."""
        return f"{self.short_precision} weights and products, float16 cache"

    @property
    def file_name(self) -> str:
        """The same for every version."""
        return "base.gguf"

    def check(self) -> None:
        """CUDA needs a build with it; sliding windows have no place in the file."""
        if self.setup.device == "cuda":
            import llama_cpp

            if not llama_cpp.llama_supports_gpu_offload():
                raise PeerUnavailable(
                    "this llama-cpp-python is built for the CPU: "
                    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --force-reinstall --no-cache-dir '
                    "llama-cpp-python builds it with CUDA"
                )
        window = self.setup.checkpoint.config.sliding_window
        if window is not None and window < self.setup.positions:
            raise PeerUnavailable(
                f"a sliding window of {window} tokens, shorter than the {self.setup.positions} of this run, "
                "cannot be said in this model's GGUF file"
            )

    def convert(self, target: Path) -> None:
        """Write the GGUF file."""
        write_base_gguf(target, self.setup.base_model, self.setup.dtype)

    def arguments(self, threads: int) -> dict[str, Any]:
        """See LlamaCppSession."""
        layers = -1 if self.setup.device == "cuda" else 0
        return {"positions": self.setup.positions, "threads": threads, "gpu_layers": layers}
