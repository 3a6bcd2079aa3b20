"""OpenVINO GenAI's continuous batching pipeline on the CPU, one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .base import PeerSetup, PeerUnavailable, Session, short_name
from .files import FilePeer, exported, run_apart

_BLOCK = 32  # tokens of a block of OpenVINO's cache on the CPU


class OpenVinoSession(Session):
    """Timed: `step` of the pipeline (forward pass and greedy sampling) and the read of the token it made.

    precision: "f32" or "bf16", of products and cache.
    """

    def __init__(self, path: str, positions: int, threads: int, precision: str) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = positions // _BLOCK + 4
        scheduler.max_num_batched_tokens = max(positions, _BLOCK)  # a prompt is one pass
        scheduler.max_num_seqs = 1
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            path,
            scheduler,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": "1",
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": precision,
                "KV_CACHE_PRECISION": precision,  # else 8-bit integers
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            },
        )
        self.positions = positions
        self.requests = 0
        self.handle: Any = None

    def start(self, ids: Sequence[int]) -> int:
        return self._begin(ids, self.positions)

    def prompt(self, ids: Sequence[int]) -> int:
        return self._begin(ids, 1)

    def step(self) -> int:
        self.pipeline.step()
        return self._read()

    def _begin(self, ids: Sequence[int], most: int) -> int:
        import numpy as np
        import openvino
        import openvino_genai

        self._end()
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = most
        config.ignore_eos = True
        config.do_sample = False
        self.requests += 1
        prompt = openvino.Tensor(np.array([list(ids)], dtype=np.int64))
        self.handle = self.pipeline.add_request(self.requests, prompt, config)
        while not self.handle.can_read():
            self.pipeline.step()
        return self._read()

    def _read(self) -> int:
        (output,) = self.handle.read().values()
        return int(output.generated_ids[-1])

    def _end(self) -> None:
        """A request that goes on is dropped by the step after its cancellation."""
        if self.handle is not None:
            self.handle.cancel()
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            self.handle = None

    def close(self) -> None:
        self._end()
        del self.pipeline


class OpenVinoGenAI(FilePeer):
    """In the engine's type, weights as the plugin packs them for it."""

    title = "OpenVINO GenAI"
    package = "openvino-genai"
    module = "openvino_genai"
    extra = "peers-openvino"
    session = OpenVinoSession

    def check(self) -> None:
        """The CPU only, and only precisions that it computes in."""
        if self.setup.device != "cpu":
            raise PeerUnavailable("OpenVINO has no CUDA device")
        import openvino

        able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self.short_precision == "bf16" and "BF16" not in able:
            raise PeerUnavailable(
                f"OpenVINO does not compute in bfloat16 on this processor, only in {', '.join(able)}; "
                "openvino-float32 can run"
            )

    @property
    def short_precision(self) -> str:
        """OpenVINO's word for it."""
        return short_name(self.setup.dtype)

    @property
    def file_name(self) -> str:
        """The same for all precisions: the plugin converts when it loads."""
        import openvino

        return f"openvino-{openvino.__version__.split('-')[0]}"

    def convert(self, target: Path) -> None:
        """Trace the exported model."""
        source = exported(self.setup)
        command = ["-m", f"{__package__}.openvino_export", str(source), str(target)]
        run_apart(command, "OpenVINO could not convert the model")

    def arguments(self, threads: int) -> dict[str, Any]:
        """See OpenVinoSession."""
        return {
            "positions": self.setup.positions,
            "threads": threads,
            "precision": self.short_precision,
        }


class OpenVinoGenAIFloat32(OpenVinoGenAI):
    """The weights rounded to the engine's type, products and cache in float32."""

    def __init__(self, setup: PeerSetup) -> None:
        if setup.dtype == torch.float32:
            raise PeerUnavailable("the run is in float32: openvino is the same")
        super().__init__(setup)

    @property
    def short_precision(self) -> str:
        """OpenVINO's word for it."""
        return "f32"

    @property
    def precision(self) -> str:
        """The values are those of the run."""
        return f"weights rounded to {short_name(self.setup.dtype)}, computed in f32, f32 cache"
