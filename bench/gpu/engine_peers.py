"""Dense decoding by others on the same device and shapes: transformers' Llama with a static cache, by torch.compile
and in a plain CUDA graph, and gpt-fast where a checkout of it is.

Every way decodes greedily at batch 1 behind the same context, is warm when it is timed, and queues step behind step
without the host reading a token: what it takes is the device's time, or the host's where that is longer.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexidepth.config import FlexiDepthConfig

from .gpt_fast import GptFast

GRAPH = "transformers, static cache, CUDA graph"
COMPILED = "transformers, static cache, torch.compile (reduce-overhead)"
GPT_FAST = "gpt-fast, torch.compile (reduce-overhead)"
_WARM_UP = 4  # steps: one that makes the caches, and those in which torch.compile compiles, records and replays
_ROUNDS = 3


@dataclass(frozen=True)
class PeerRow:
    """ms: of a step at batch 1; None where it could not run, and `said` tells why. Beside a time `said` tells what it
    was not: torch.compile leaves CUDA graphs out where it sees fit, and says so only here."""

    name: str
    context: int
    ms: float | None
    said: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def time_peers(
    config: FlexiDepthConfig,
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    steps: int = 32,
    gpt_fast: Path | None = None,
) -> Iterator[PeerRow]:
    """One row for each way, as it comes; what fails is told, not raised: these are others' programs. gpt_fast: a
    checkout of it."""
    room = 1 + _WARM_UP + 1 + _ROUNDS * steps  # tokens that a way decodes
    ways: dict[str, Callable[[], Callable[[], object]]] = {
        GRAPH: lambda: _in_a_graph(Peer(config, dtype, device, context, room)),
        COMPILED: lambda: _compiled(Peer(config, dtype, device, context, room)),
    }
    if gpt_fast is not None:
        ways[GPT_FAST] = partial(_gpt_fast, gpt_fast, config, dtype, device, context, room)
    for name, way in ways.items():
        yield _time(name, way, context, device, steps)


def _time(
    name: str,
    way: Callable[[], Callable[[], object]],
    context: int,
    device: torch.device,
    steps: int,
) -> PeerRow:
    skips = _graph_skips()
    try:
        ms = _mean_ms(way(), device, steps)
        skips = _graph_skips() - skips
        return PeerRow(name, context, ms, f"{skips} x without a CUDA graph" if skips else "")
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
        return PeerRow(name, context, None, said[:300])
    finally:  # the next one finds the memory, and nothing compiled
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _graph_skips() -> int:
    """How often torch.compile has left a CUDA graph out in this process."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


class Peer:
    """transformers' Llama that decodes one token a step, greedily, behind a context of zeros."""

    def __init__(
        self,
        config: FlexiDepthConfig,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
        more: int,
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

        same = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings",
        )  # fmt: skip
        theirs = LlamaConfig(**{key: getattr(config, key) for key in same})
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.model = LlamaForCausalLM(theirs).eval()
                self.cache = StaticCache(config=theirs, max_cache_len=context + more)
                self.token = torch.full((1, 1), 5)
                self.position = torch.tensor([context])
            self.cache.early_initialization(
                1, theirs.num_key_value_heads, theirs.head_dim, dtype, device
            )
        finally:
            torch.set_default_dtype(before)
        # transformers 5 keeps count itself; before, cache_position said where a token goes.
        self.takes_place = "cache_position" in inspect.signature(self.model.forward).parameters
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(context)
        self.forward: Callable[..., Any] = self.model.forward

    @torch.no_grad()
    def step(self) -> None:
        """One token."""
        place = {"cache_position": self.position} if self.takes_place else {}
        out = self.forward(
            input_ids=self.token,
            past_key_values=self.cache,
            position_ids=self.position[None],
            use_cache=True,
            **place,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)


def _in_a_graph(peer: Peer) -> Callable[[], object]:
    peer.step()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            peer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        peer.step()

    def replay(peer: Peer = peer) -> None:  # held: the graph reads its weights and writes its cache
        graph.replay()

    return replay


def _compiled(peer: Peer) -> Callable[[], object]:
    """The model's pass compiled; what it writes between passes stays outside, or no graph would be made."""
    peer.step()  # uncompiled: what it makes on its way is made
    peer.forward = torch.compile(peer.model.forward, mode="reduce-overhead")

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        peer.step()

    for _ in range(_WARM_UP):
        step()
    return step


def _gpt_fast(
    checkout: Path,
    config: FlexiDepthConfig,
    dtype: torch.dtype,
    device: torch.device,
    context: int,
    room: int,
) -> Callable[[], object]:
    peer = GptFast(checkout, config, dtype, device, context, room)
    for _ in range(_WARM_UP):
        peer.step()
    return peer.step


def _mean_ms(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Steps queued one behind the other, as the engine's are; the best of three rounds."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rounds = []
    for _ in range(_ROUNDS):
        wait()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        rounds.append((time.perf_counter() - begin) / steps)
    return 1e3 * min(rounds)
