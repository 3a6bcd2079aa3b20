"""Dense decoding by others on the same device and shapes: transformers' Llama with a static cache, by torch.compile
and in a plain CUDA graph."""

from __future__ import annotations

import statistics
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
    """ms: median of a step at batch 1; None where it could not run, and `said` tells why."""

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
    ways: dict[str, Callable[[Callable[[], None]], Callable[[], object]]] = {
        GRAPH: _in_a_graph,
        COMPILED: _compiled,
    }
    rows = []
    for name, way in ways.items():
        try:
            step = way(_step(config, dtype, device, context, 4 * steps))
            rows.append(PeerRow(name, context, _median_ms(step, device, steps)))
        except Exception as error:
            rows.append(PeerRow(name, context, None, f"{type(error).__name__}: {error}"[:300]))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _step(
    config: FlexiDepthConfig, dtype: torch.dtype, device: torch.device, context: int, more: int
) -> Callable[[], None]:
    """A function that decodes one token, greedily, behind a context of zeros."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings",
    )  # fmt: skip
    theirs = LlamaConfig(**{key: getattr(config, key) for key in same})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(theirs).eval()
            cache = StaticCache(config=theirs, max_cache_len=context + more)
            token = torch.full((1, 1), 5)
            position = torch.tensor([context])
    finally:
        torch.set_default_dtype(before)

    @torch.inference_mode()
    def step() -> None:
        out = model(
            token,
            past_key_values=cache,
            cache_position=position,
            position_ids=position[None],
            use_cache=True,
        )
        token.copy_(out.logits[:, -1:].argmax(-1))
        position.add_(1)

    return step


def _in_a_graph(step: Callable[[], None]) -> Callable[[], object]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _compiled(step: Callable[[], None]) -> Callable[[], object]:
    made: Callable[[], object] = torch.compile(step, mode="reduce-overhead")
    for _ in range(4):
        made()
    return made


def _median_ms(step: Callable[[], object], device: torch.device, steps: int) -> float:
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(steps):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)
