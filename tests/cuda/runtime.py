"""A device that is not there: the emulated kernels behind the interface of the CUDA runtime.

A capture runs the calls once, as the real runtime does, then records them with their arguments and runs none, as a CUDA
graph does; a replay runs them with those arguments, whatever has happened since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

Calls = list[tuple[Callable[..., Any], tuple[Any, ...]]]


class RecordedGraph:
    """Calls to be run again."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.replays = calls, 0

    def replay(self) -> None:
        """Run them."""
        self.replays += 1
        for function, arguments in self.calls:
            function(*arguments)


class RecordingModule:
    """The emulated module; while `calls` is a list, kernels are noted there instead of run."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.calls: Calls | None = None

    def CudaPass(self, *arguments: Any) -> Any:
        """A pass whose `run` is recorded too."""
        return RecordingPass(self, self._module.CudaPass(*arguments))

    def launch(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run or note a call."""
        if self.calls is None:
            return function(*arguments)
        self.calls.append((function, arguments))
        return None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if name in ("sample", "advance"):
            return lambda *arguments: self.launch(found, *arguments)
        return found


class RecordingPass:
    """A pass that may be captured."""

    def __init__(self, module: RecordingModule, native: Any) -> None:
        self._module, self._native = module, native

    def run(self, *arguments: Any) -> None:
        """Run or note it."""
        self._module.launch(self._native.run, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


class FakeRuntime:
    """The runtime of no device. free: bytes that it says are free. times: seconds that it says replays took,
    in turn; None = as long in every form."""

    def __init__(
        self, emulated: Any, free: int = 1 << 40, times: Iterable[float] | None = None
    ) -> None:
        self.module = RecordingModule(emulated)
        self.device = torch.device("cpu")
        self.free = free
        self.can_overlap = True
        self.graphs: list[RecordedGraph] = []
        self.waits = 0
        self.times = iter(cycle((1.0,)) if times is None else times)

    @property
    def stream(self) -> int:
        return 0

    def follow(self) -> None:
        pass

    def active(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def host(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def capture(self, launch: Callable[[], None]) -> RecordedGraph:
        launch()  # as the real one does, to load the kernels
        self.module.calls = []
        try:
            launch()
            self.graphs.append(RecordedGraph(self.module.calls))
        finally:
            self.module.calls = None
        return self.graphs[-1]

    def seconds_of(self, graph: RecordedGraph) -> float:
        for _ in range(2):
            graph.replay()
        return next(self.times)

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.waits += 1

        return wait

    def free_bytes(self) -> int:
        return self.free

    def synchronize(self) -> None:
        self.waits += 1

    def give_back(self) -> None:
        pass
