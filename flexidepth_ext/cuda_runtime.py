"""What the CUDA engine asks of the device beside its kernels: memory, streams, graphs, events."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .cuda_device import can_overlap, cuda_module
from .errors import UnsupportedError

_CAPTURING = threading.Lock()
_SAMPLES, _REPLAYS = 5, 8  # of a measurement
_SAMPLE_MS = 5.0  # about what a sample takes: of long passes fewer replays


class Graph(Protocol):
    """Launches that were captured, to be run again."""

    def replay(self) -> None:
        """Queue them."""


class Runtime(Protocol):
    """module: the compiled one. device: where tensors live."""

    module: Any
    device: torch.device

    @property
    def stream(self) -> int:
        """Handle of the stream that work is queued on."""

    @property
    def can_overlap(self) -> bool:
        """Whether kernels can begin before those ahead of them have ended."""

    def follow(self) -> None:
        """Work that is queued from here on waits for what the caller's stream holds."""

    def active(self) -> AbstractContextManager[Any]:
        """Within it tensors are made on the device and work goes to the engine's stream."""

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that kernels may write to, zeros."""

    def capture(self, launch: Callable[[], None]) -> Graph:
        """A graph of the kernels that `launch` queues, and of nothing else."""

    def seconds_of(self, graph: Graph) -> float:
        """What a replay takes on the device: the median of several."""

    def mark(self) -> Callable[[], None]:
        """A place in the stream; the result, called, waits until the device has come there."""

    def free_bytes(self) -> int:
        """Of device memory."""

    def synchronize(self) -> None:
        """Wait for all work that was queued."""

    def give_back(self) -> None:
        """Let others have device memory that is no longer used."""


class CudaRuntime:
    """The runtime of an NVIDIA device, by way of torch.

    Raises UnsupportedError where this build, this torch or this machine has no CUDA, or no such device.
    """

    def __init__(self, device: str | torch.device = "cuda") -> None:
        self.module = cuda_module()
        if not torch.cuda.is_available():
            what = "was built without CUDA" if torch.version.cuda is None else "finds no device"
            raise UnsupportedError(
                f"cuda: torch {torch.__version__} {what}, and the engine's memory is torch's; install a torch for the "
                "CUDA that the driver supports (https://pytorch.org), or use device='cpu'"
            )
        wanted = torch.device(device)
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise UnsupportedError(
                f"cuda: device {wanted}; there are {torch.cuda.device_count()}, counted from 0"
            )
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """Handle of the engine's own stream."""
        return int(self._stream.cuda_stream)

    @property
    def can_overlap(self) -> bool:
        """From compute capability 9.0 on, where the build has code for it."""
        return can_overlap(torch.cuda.get_device_capability(self.device), self.module.archs)

    def follow(self) -> None:
        """Work that is queued from here on waits for what the caller's stream holds."""
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def active(self) -> AbstractContextManager[Any]:
        """Make the engine's stream and device the current ones."""
        return torch.cuda.stream(self._stream)

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory: its address is the device's too."""
        return torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=True)

    def capture(self, launch: Callable[[], None]) -> Graph:
        """Capture on the engine's stream. The first run of each kernel loads it, which a capture may not do."""
        launch()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # One capture at a time in a process, and other threads go on meanwhile.
        with (
            _CAPTURING,
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            launch()
        return graph

    def seconds_of(self, graph: Graph) -> float:
        """By events, several replays between two of them."""
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

        def milliseconds(replays: int) -> float:
            begin.record(self._stream)
            for _ in range(replays):
                graph.replay()
            end.record(self._stream)
            end.synchronize()
            return float(begin.elapsed_time(end)) / replays

        with self.active():
            milliseconds(1)  # the first one uploads the graph
            replays = max(1, min(_REPLAYS, round(_SAMPLE_MS / max(milliseconds(1), 1e-3))))
            return statistics.median(milliseconds(replays) for _ in range(_SAMPLES)) / 1e3

    def mark(self) -> Callable[[], None]:
        """An event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.synchronize

    def free_bytes(self) -> int:
        """What the driver has free, and what torch keeps for later."""
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + kept

    def synchronize(self) -> None:
        """Wait for the engine's stream."""
        self._stream.synchronize()

    def give_back(self) -> None:
        """To the driver: torch keeps freed memory for the stream that it was of."""
        torch.cuda.empty_cache()
