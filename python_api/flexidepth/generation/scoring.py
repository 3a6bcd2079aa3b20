"""Log-probabilities of given tokens: what evaluation needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..routing import ForcedRouting
from .inputs import to_ids

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine

_ROWS = 64  # rows of logits in memory at once: 64 x 49152 x 4 bytes = 12.6 MB


@dataclass(frozen=True)
class Score:
    """token_ids [T]; logprobs float32 [T - 1] of tokens 1..T-1 given those before; greedy: which of them
    were the model's first choice; mean_layers_used over all tokens."""

    token_ids: list[int]
    logprobs: Tensor
    greedy: Tensor
    mean_layers_used: float

    @property
    def perplexity(self) -> float:
        """exp(-mean log-probability)."""
        return float(torch.exp(-self.logprobs.mean()))


def context_ids(context: str, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """Ids of what comes before a scored text. Before its beginning stands BOS, or EOS where the tokenizer has
    no BOS, as in lm-eval."""
    if context or tokenizer is None:
        return to_ids(context, tokenizer, vocab_size)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise UnsupportedError(
            "loglikelihood: the context is empty and this tokenizer has neither BOS nor EOS to stand for the "
            "beginning of a text; give a context"
        )
    return to_ids([start], None, vocab_size)


def score_ids(
    engine: Engine, ids: list[int], routing: ForcedRouting, thresholds: Tensor | None
) -> Score:
    """Score one token sequence of at least two tokens."""
    cache = engine.new_cache(len(ids))
    rows = min(_ROWS, engine.max_rows)
    tokens = torch.tensor(ids, dtype=torch.int32, device="cpu")
    logprobs, greedy, ran = [], [], 0
    for start in range(0, len(ids), rows):
        stop = min(start + rows, len(ids))
        step = engine.forward(
            tokens[start:stop].contiguous(),
            [stop - start],
            [cache],
            routing=routing.mode,
            mask=routing.rows(start, stop),
            thresholds=thresholds,
            logits_rows=torch.arange(stop - start, dtype=torch.int32, device="cpu"),
        )
        ran += int(step.ran.sum())
        targets = tokens[start + 1 : stop + 1].long()
        table = torch.log_softmax(step.logits[: len(targets)], -1)
        logprobs.append(table.gather(1, targets[:, None]).squeeze(1))
        greedy.append(table.argmax(-1) == targets)
    cache.release()
    always = engine.config.num_hidden_layers - engine.num_routed
    return Score(ids, torch.cat(logprobs), torch.cat(greedy), always + ran / len(ids))
