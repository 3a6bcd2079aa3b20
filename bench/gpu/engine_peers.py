"""Dense decoding by others on the same device and shapes: transformers' Llama with a static cache, by torch.compile
and in a plain CUDA graph."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexidepth.config import FlexiDepthConfig

GRAPH = "transformers, static cache, CUDA graph"
COMPILED = "transformers, static cache, torch.compile (reduce-overhead)"


@dataclass(frozen=True)
class PeerRow:
    """ms: of a step at batch 1; None where it could not run, and `said` tells why."""

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
) -> list[PeerRow]:
    """One row for each way; what fails is told, not raised: these are others' programs."""
    ways: dict[str, Callable[[Peer], Callable[[], object]]] = {
        GRAPH: _in_a_graph,
        COMPILED: _compiled,
    }
    rows = []
    for name, way in ways.items():
        peer = None
        try:
            peer = Peer(config, dtype, device, context, 4 * steps)
            peer.step()
            rows.append(PeerRow(name, context, _mean_ms(way(peer), device, steps)))
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
            rows.append(PeerRow(name, context, None, said[:300]))
        del peer
        gc.collect()
    return rows


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
        finally:
            torch.set_default_dtype(before)
        self.forward: Callable[..., Any] = self.model.forward

    @torch.inference_mode()
    def step(self) -> None:
        """One token."""
        out = self.forward(
            input_ids=self.token,
            past_key_values=self.cache,
            cache_position=self.position,
            position_ids=self.position[None],
            use_cache=True,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)


def _in_a_graph(peer: Peer) -> Callable[[], object]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            peer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        peer.step()
    return graph.replay


def _compiled(peer: Peer) -> Callable[[], object]:
    """The model's pass compiled; what it writes between passes stays outside, or no graph would be made."""
    peer.forward = torch.compile(peer.model.forward, mode="reduce-overhead")

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        peer.step()

    for _ in range(4):
        step()
    return step


def _mean_ms(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Steps queued one behind the other, as the engine's are; the best of three rounds."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rounds = []
    for _ in range(3):
        wait()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        rounds.append((time.perf_counter() - begin) / steps)
    return 1e3 * min(rounds)
