"""ONNX Runtime GenAI on the CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .base import PeerUnavailable, Session, require, short_name
from .files import FilePeer, exported, run_apart


class OnnxRuntimeSession(Session):
    """Timed: `generate_next_token` (forward pass and greedy choice) and the read of the token.

    end: the id that would end the sequence, and is therefore never chosen: a rare one.
    """

    def __init__(self, path: str, positions: int, threads: int, end: int) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(path)
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        model = {"eos_token_id": end, "decoder": {"session_options": options}}
        config.overlay(json.dumps({"model": model}))
        self.model = onnxruntime_genai.Model(config)
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        parameters.set_search_options(min_length=positions, max_length=positions, do_sample=False)
        self.generator = onnxruntime_genai.Generator(self.model, parameters)

    def start(self, ids: Sequence[int]) -> int:
        import numpy as np

        self.generator.rewind_to(0)
        self.generator.append_tokens(np.array(ids, dtype=np.int32))
        return self.step()

    def step(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def close(self) -> None:
        del self.generator, self.model


class OnnxRuntimeGenAI(FilePeer):
    """Its CPU kernels compute in float32, whatever the engine's type: the closest that there is."""

    title = "ONNX Runtime GenAI"
    package = "onnxruntime-genai"
    module = "onnxruntime_genai"
    extra = "peers-onnx"
    session = OnnxRuntimeSession

    def check(self) -> None:
        """The CPU only; the model builder has needs of its own."""
        if self.setup.device != "cpu":
            raise PeerUnavailable("runs on the CPU here; its CUDA package is another one, untried")
        require("onnx_ir", self.extra)

    @property
    def short_precision(self) -> str:
        """Of the products."""
        return "f32"

    @property
    def precision(self) -> str:
        """The values are those of the run."""
        if self.setup.dtype == torch.float32:
            return super().precision
        return f"weights rounded to {short_name(self.setup.dtype)}, computed in f32, f32 cache"

    @property
    def file_name(self) -> str:
        """Graphs differ from version to version."""
        return f"onnxruntime-genai-{self.version}"

    def convert(self, target: Path) -> None:
        """By the model builder that comes with the package."""
        source = exported(self.setup)
        with tempfile.TemporaryDirectory() as cache:
            run_apart(
                [
                    *("-m", "onnxruntime_genai.models.builder"),
                    *("-m", str(source), "-i", str(source), "-o", str(target)),
                    *("-p", "fp32", "-e", "cpu", "-c", cache),
                ],
                "onnxruntime_genai.models.builder could not convert the model",
            )

    def arguments(self, threads: int) -> dict[str, Any]:
        """See OnnxRuntimeSession."""
        last = self.setup.checkpoint.config.vocab_size - 1
        return {"positions": self.setup.positions, "threads": threads, "end": last}
