"""What a generation returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..config import FlexiDepthConfig
from ..metrics import Metrics, peak_memory_bytes
from ..routing import RoutingReport
from .loop import Sequence


@dataclass(frozen=True)
class GenerationOutput:
    """One answer.

    finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens), "stopped" (a criterion).
    token_ids: new tokens, the end token included. logprobs: log-probability of each, and top_logprobs the
    most likely alternatives as (token, log-probability), where asked for. routing: where asked for.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    finish_reason: str
    seed: int
    metrics: Metrics
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    routing: RoutingReport | None = None


def make_output(
    sequence: Sequence,
    config: FlexiDepthConfig,
    tokenizer: Any | None,
    mode: str,
    *,
    with_routing: bool,
    with_logprobs: bool,
    seed: int,
) -> GenerationOutput:
    """Collect a finished sequence."""
    ran = (
        torch.cat(sequence.ran)
        if sequence.ran
        else torch.empty(0, config.num_routed_layers, dtype=torch.uint8, device="cpu")
    )
    report = routing_report(sequence, config, tokenizer, mode) if with_routing else None
    computed = len(sequence.prompt) - sequence.cached_tokens
    decoded = ran[computed:] if len(ran) > computed else ran
    always = config.num_hidden_layers - config.num_routed_layers
    return GenerationOutput(
        text=sequence.stream.text,
        token_ids=sequence.tokens,
        prompt_ids=sequence.prompt,
        finish_reason=sequence.finish_reason or "stopped",
        seed=seed,
        metrics=Metrics(
            prompt_tokens=len(sequence.prompt),
            cached_tokens=sequence.cached_tokens,
            new_tokens=len(sequence.tokens),
            prefill_s=sequence.prefill_s,
            decode_s=sequence.last_token - sequence.first_token,
            ttft_s=sequence.first_token - sequence.started,
            mean_layers_used=always + float(decoded.sum(1).float().mean())
            if len(decoded)
            else float("nan"),
            peak_memory_bytes=peak_memory_bytes(),
        ),
        logprobs=sequence.logprobs if with_logprobs else None,
        top_logprobs=sequence.top_logprobs if with_logprobs else None,
        routing=report,
    )


def routing_report(
    sequence: Sequence, config: FlexiDepthConfig, tokenizer: Any | None, mode: str
) -> RoutingReport:
    """Routing of every token that was computed: the prompt behind its cached part, then the answer.

    The last token of an answer was chosen but never computed, so it has no row.
    """
    computed = (sequence.prompt + sequence.tokens)[sequence.cached_tokens :]
    rows = sum(len(part) for part in sequence.ran)
    ids = computed[:rows]
    texts = [tokenizer.decode([i]) for i in ids] if tokenizer is not None else [str(i) for i in ids]
    return RoutingReport(
        texts,
        torch.cat(sequence.ran),
        torch.cat(sequence.gates),
        list(config.routing_layers),
        config.num_hidden_layers,
        len(sequence.prompt) - sequence.cached_tokens,
        mode,
        first_position=sequence.cached_tokens,
    )
