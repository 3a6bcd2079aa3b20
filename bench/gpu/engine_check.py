"""The CUDA engine against the CPU engine in float32, on one model and one text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flexidepth.config import FlexiDepthConfig
from flexidepth.modeling import FlexiDepthForCausalLM
from flexidepth_ext.cuda_cache import CudaKVCache
from flexidepth_ext.cuda_decode import DecodeStep, Sampling
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.cuda_runtime import Runtime
from flexidepth_ext.engine import Engine

from ..models import random_weights

_MARGIN = 0.02  # of gates around the threshold, where decisions may differ
_SETTLED = 0.999  # share of the other decisions that must agree
_WORST = 2.0  # times the error of torch in the same type


@dataclass(frozen=True)
class EngineCheck:
    """Root mean squares of the logits' errors against float32 on the same decisions: of a prompt, of the same text
    token by token, and of torch in the same type. agreement: share of decisions farther than 0.02 from the threshold
    that are float32's. same_tokens: whether graphs chose the tokens that single passes chose. same_bits: whether
    persistent passes gave the bits of those of many kernels, alone and in graphs; None where they were left out.
    overlap: whether kernels that begin before those ahead of them have ended gave these tokens and bits; None where the
    device has them wait. said: what stopped it, or why it was left out; there are no figures then."""

    model: str
    dtype: str
    prompt_error: float
    token_error: float
    torch_error: float
    agreement: float
    same_tokens: bool
    same_bits: bool | None
    overlap: bool | None
    said: str = ""
    left_out: bool = False

    @classmethod
    def stopped(
        cls, model: str, dtype: torch.dtype, said: str, left_out: bool = False
    ) -> EngineCheck:
        """One that did not come to its end, or was not begun."""
        none = math.nan
        return cls(model, _name(dtype), none, none, none, none, False, None, None, said, left_out)

    @property
    def ok(self) -> bool | None:
        """Whether it is as exact as it has to be; None where it was left out."""
        if self.left_out:
            return None
        most = _WORST * max(self.torch_error, 1e-6)
        exact = self.prompt_error <= most and self.token_error <= most  # neither is NaN, too
        same = self.same_tokens and self.same_bits is not False and self.overlap is not False
        return not self.said and exact and self.agreement >= _SETTLED and same

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "ok": self.ok}


@torch.no_grad()
def check_engine(
    name: str,
    config: FlexiDepthConfig,
    dtype: torch.dtype,
    runtime: Runtime,
    tokens: int = 256,
    persistent: bool = True,
) -> EngineCheck:
    """Both engines on the same weights, which are the dtype's values. persistent: whether persistent passes may run."""
    weights = [
        (n, t if ".router." in n else t.to(dtype).float())
        for n, t in random_weights(config, torch.float32, "cpu")
    ]
    ids = torch.randint(0, config.vocab_size, (tokens,), dtype=torch.int32)
    rows = torch.arange(tokens, dtype=torch.int32)
    host = Engine(config, weights, dtype=torch.float32)
    exact = host.forward(ids, [tokens], [host.new_cache(tokens)], logits_rows=rows)
    want, mask = exact.logits.double(), exact.ran
    host.close()

    def error(logits: Tensor) -> float:
        return float((logits.double().cpu() - want).square().mean().sqrt())

    def form(persistent: bool | None, overlap: bool | None = None) -> CudaEngine:
        return CudaEngine(
            config,
            weights,
            dtype=dtype,
            runtime=runtime,
            max_rows=tokens,
            persistent=persistent,
            overlap=overlap,
        )

    engine = form(persistent=None if persistent else False)
    prompt = engine.forward(
        ids, [tokens], [engine.new_cache(tokens)], routing="forced", mask=mask, logits_rows=rows
    )
    cache, steps = engine.new_cache(tokens), []
    for i in range(tokens):
        one = slice(i, i + 1)
        step = engine.forward(
            ids[one].clone(), [1], [cache], routing="forced", mask=mask[one].clone()
        )
        steps.append(step.logits)
    thresholds = torch.tensor([float(t) for t in config.router_thresholds])
    settled = (exact.gates - thresholds).abs() > _MARGIN
    agreement = float(((prompt.gates > thresholds) == mask.bool())[settled].float().mean())
    chosen = _tokens_of_passes(engine, ids)
    same = _tokens_of_graphs(engine, ids) == chosen
    engine.close()
    model = _torch_model(config, weights).to(runtime.device, dtype)
    theirs = model(ids.long()[None].to(runtime.device), force_routing=mask.to(runtime.device))
    bits = _bits(form(persistent=False, overlap=False), ids)
    overlap: bool | None = None
    if runtime.can_overlap:
        overlapping = form(persistent=False, overlap=True)
        overlap = _tokens_of_graphs(overlapping, ids) == chosen
        overlap = _alike(_bits(overlapping, ids), bits) and overlap
    same_bits: bool | None = None
    if persistent:
        same_bits = _alike(_bits(form(persistent=True, overlap=False), ids), bits)
    return EngineCheck(
        name,
        _name(dtype),
        error(prompt.logits),
        error(torch.cat(steps)),
        error(theirs.logits[0]),
        agreement,
        same,
        same_bits,
        overlap,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tokens_of_passes(engine: CudaEngine, ids: Tensor, count: int = 12) -> list[int]:
    """Greedy tokens of single passes."""
    cache = engine.new_cache(len(ids) + count)
    tokens = [int(engine.forward(ids, [len(ids)], [cache]).logits.argmax())]
    for _ in range(count - 1):
        step = engine.forward(torch.tensor(tokens[-1:], dtype=torch.int32), [1], [cache])
        tokens.append(int(step.logits.argmax()))
    return tokens


def _tokens_of_graphs(engine: CudaEngine, ids: Tensor, count: int = 12) -> list[int]:
    """The same of graphs that run ahead."""
    cache = engine.new_cache(len(ids) + count)
    tokens = [int(engine.forward(ids, [len(ids)], [cache]).logits.argmax())]
    for step in _decode(engine, [cache], tokens, count - 1):
        tokens += step.tokens
    return tokens


def _decode(
    engine: CudaEngine, caches: list[CudaKVCache], tokens: list[int], count: int
) -> Iterator[DecodeStep]:
    """Greedy steps, always one of them ahead."""
    run = engine.decode(caches, tokens, Sampling(), seeds=[0] * len(caches))
    run.launch()
    for number in range(1, count + 1):
        if number < count:
            run.launch()
        yield run.collect()


def _bits(engine: CudaEngine, ids: Tensor, count: int = 3) -> list[Tensor]:
    """Logits, gates and decisions of one, two and all of three sequences side by side, then what graphs choose for
    these, and the caches. Closes the engine."""
    starts = [len(ids), len(ids) // 2, 3]
    caches = [engine.new_cache(len(ids) + 4 * count) for _ in starts]
    for start, cache in zip(starts, caches, strict=True):
        engine.forward(ids[:start].clone(), [start], [cache])
    made: list[Tensor] = []
    for number in range(3 * count):
        beside = caches[: number // count + 1]
        tokens = ids[number : number + len(beside)].clone()
        step = engine.forward(tokens, [1] * len(beside), beside)
        made += [step.logits, step.gates, step.ran]
    for chosen in _decode(engine, caches, ids[: len(caches)].tolist(), count):
        made += [torch.tensor(chosen.tokens), torch.tensor(chosen.logprobs)]
        made += [chosen.gates, chosen.ran]
    for cache in caches:
        cache.poison_unused()
        with engine.runtime.active():  # behind the poison
            made += [page.cpu() for page in cache.pages]
    engine.close()
    return made


def _alike(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _torch_model(
    config: FlexiDepthConfig, weights: list[tuple[str, Tensor]]
) -> FlexiDepthForCausalLM:
    model = FlexiDepthForCausalLM(config)
    model.eval()
    state = dict(weights)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.tie_weights()
    return model
