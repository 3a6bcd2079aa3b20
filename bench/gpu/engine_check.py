"""The CUDA engine against the CPU engine in float32, on one model and one text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flexidepth.config import FlexiDepthConfig
from flexidepth.modeling import FlexiDepthForCausalLM
from flexidepth_ext.cuda_decode import Sampling
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
    persistent passes gave the bits of those of many kernels."""

    model: str
    dtype: str
    prompt_error: float
    token_error: float
    torch_error: float
    agreement: float
    same_tokens: bool
    same_bits: bool

    @property
    def ok(self) -> bool:
        """Whether it is as exact as it has to be."""
        worst = max(self.prompt_error, self.token_error)
        exact = worst <= _WORST * max(self.torch_error, 1e-6)
        return exact and self.agreement >= _SETTLED and self.same_tokens and self.same_bits

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "ok": self.ok}


@torch.no_grad()
def check_engine(
    name: str, config: FlexiDepthConfig, dtype: torch.dtype, runtime: Runtime, tokens: int = 256
) -> EngineCheck:
    """Both engines on the same weights, which are the dtype's values."""
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

    engine = CudaEngine(config, weights, dtype=dtype, runtime=runtime, max_rows=tokens)
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
    same = _same_tokens(engine, ids)
    engine.close()
    model = _torch_model(config, weights).to(runtime.device, dtype)
    theirs = model(ids.long()[None].to(runtime.device), force_routing=mask.to(runtime.device))
    return EngineCheck(
        name,
        str(dtype).removeprefix("torch."),
        error(prompt.logits),
        error(torch.cat(steps)),
        error(theirs.logits[0]),
        agreement,
        same,
        _same_bits(config, weights, dtype, runtime, ids),
    )


def _same_tokens(engine: CudaEngine, ids: Tensor, count: int = 12) -> bool:
    """Greedy tokens of single passes, and of graphs that run ahead."""
    caches = [engine.new_cache(len(ids) + count) for _ in range(2)]
    first = [int(engine.forward(ids, [len(ids)], [cache]).logits.argmax()) for cache in caches]
    plain, ahead = [first[0]], [first[1]]
    for _ in range(count - 1):
        step = engine.forward(torch.tensor(plain[-1:], dtype=torch.int32), [1], caches[:1])
        plain.append(int(step.logits.argmax()))
    run = engine.decode(caches[1:], first[1:], Sampling(), seeds=[0])
    run.launch()
    while run.in_flight:
        if len(ahead) + run.in_flight < count:
            run.launch()
        ahead += run.collect().tokens
    return plain == ahead


def _same_bits(
    config: FlexiDepthConfig,
    weights: list[tuple[str, Tensor]],
    dtype: torch.dtype,
    runtime: Runtime,
    ids: Tensor,
    count: int = 3,
) -> bool:
    """Logits, gates, decisions and caches of one, two and all of three sequences side by side, in both forms."""
    found: list[list[Tensor]] = []
    starts = [len(ids), len(ids) // 2, 3]
    for persistent in (False, True):
        engine = CudaEngine(
            config, weights, dtype=dtype, runtime=runtime, max_rows=len(ids), persistent=persistent
        )
        caches = [engine.new_cache(len(ids) + 3 * count) for _ in starts]
        for start, cache in zip(starts, caches, strict=True):
            engine.forward(ids[:start].clone(), [start], [cache])
        made: list[Tensor] = []
        for number in range(3 * count):
            beside = caches[: number // count + 1]
            tokens = ids[number : number + len(beside)].clone()
            step = engine.forward(tokens, [1] * len(beside), beside)
            made += [step.logits, step.gates, step.ran]
        for cache in caches:
            cache.poison_unused()
            with runtime.active():  # behind the poison
                made += [page.cpu() for page in cache.pages]
        engine.close()
        found.append(made)
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


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
