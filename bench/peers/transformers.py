"""transformers' own class of the base model: eager, and compiled with a static cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Peer, PeerSetup, PeerUnavailable, Session


class EagerSession(Session):
    """Timed: the forward pass with a dynamic cache, argmax, and the choice brought to the host."""

    def __init__(self, model: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, self.threads = model, threads

    @torch.inference_mode()
    def start(self, ids: Sequence[int]) -> int:
        from transformers import DynamicCache

        torch.set_num_threads(self.threads)
        self.cache = DynamicCache()
        return self._pass(torch.tensor([list(ids)], device=self.model.device))

    @torch.inference_mode()
    def step(self) -> int:
        return self._pass(self.token)

    def _pass(self, ids: Tensor) -> int:
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1].argmax(-1, keepdim=True)
        return int(self.token)


class CompiledSession(Session):
    """Timed: the compiled forward pass with a static cache, argmax, and the choice brought to the host.

    A decode case's `start` fills the cache without compiling; compiled are the step and, for prompt cases, the
    pass over a prompt of this length, each on first use.
    """

    def __init__(self, model: Any, positions: int, threads: int) -> None:
        from transformers import StaticCache

        torch.set_num_threads(threads)
        self.model, self.threads = model, threads
        self.cache = StaticCache(config=model.config, max_cache_len=positions)
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self.compiled: Callable[..., Any] = torch.compile(model.forward, dynamic=False, mode=mode)

    @torch.inference_mode()
    def start(self, ids: Sequence[int]) -> int:
        return self._begin(self.model.forward, ids)

    @torch.inference_mode()
    def prompt(self, ids: Sequence[int]) -> int:
        return self._begin(self.compiled, ids)

    @torch.inference_mode()
    def step(self) -> int:
        return self._pass(self.compiled, self.token)

    def _begin(self, forward: Callable[..., Any], ids: Sequence[int]) -> int:
        torch.set_num_threads(self.threads)
        self.cache.reset()
        self.length = 0
        return self._pass(forward, torch.tensor([list(ids)], device=self.model.device))

    def _pass(self, forward: Callable[..., Any], ids: Tensor) -> int:
        count = ids.shape[1]
        positions = torch.arange(self.length, self.length + count, device=ids.device)
        self.length += count
        if ids.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        out = forward(
            input_ids=ids,
            position_ids=positions[None],
            cache_position=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token = out.logits[:, -1].argmax(-1, keepdim=True)
        return int(self.token)

    def close(self) -> None:
        # What was compiled for this cache and these threads is of no use to another session.
        torch._dynamo.reset()


class _TransformersPeer(Peer):
    package = "transformers"
    dtype: torch.dtype

    @property
    def short_precision(self) -> str:
        """transformers' word for it."""
        return str(self.dtype).removeprefix("torch.")


class TransformersEager(_TransformersPeer):
    """In the engine's type."""

    title = "transformers eager"

    def __init__(self, setup: PeerSetup) -> None:
        super().__init__(setup)
        self.dtype = setup.dtype

    def open(self, threads: int) -> Session:
        """On the shared model."""
        return EagerSession(self.setup.base_model, threads)


class TransformersEagerFloat32(_TransformersPeer):
    """In float32, beside the engine's type: often faster on a CPU without bfloat16 instructions."""

    title = "transformers eager"
    dtype = torch.float32

    def __init__(self, setup: PeerSetup) -> None:
        super().__init__(setup)
        if setup.dtype == torch.float32:
            raise PeerUnavailable("the run is in float32: transformers-eager is the same")

    def open(self, threads: int) -> Session:
        """On the shared float32 model."""
        return EagerSession(self.setup.float32_model, threads)


class TransformersCompile(_TransformersPeer):
    """torch.compile: default mode on the CPU, reduce-overhead (CUDA graphs) on CUDA."""

    title = "transformers compile"
    compilers: ClassVar[tuple[str, ...]] = ("g++", "clang++")

    def __init__(self, setup: PeerSetup) -> None:
        super().__init__(setup)
        self.dtype = setup.dtype
        wanted = (os.environ["CXX"],) if "CXX" in os.environ else self.compilers
        if setup.device == "cpu" and not any(map(shutil.which, wanted)):
            raise PeerUnavailable(
                f"no C++ compiler for torch.compile: {' and '.join(wanted)} not found; install one or set CXX"
            )

    def open(self, threads: int) -> Session:
        """On the shared model; nothing is compiled yet."""
        return CompiledSession(self.setup.base_model, self.setup.positions, threads)
