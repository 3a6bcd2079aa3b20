"""What evaluation asks of the engine, answered by the trainable model: for ablations, which the engine does not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flexidepth_ext.cpu_info import cpu_flags
from flexidepth_ext.engine import StepResult
from flexidepth_ext.forward_arguments import Routing

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.trainable import trainable
from ..errors import UnsupportedError
from ..routing import ForcedRouting
from .torch_cache import BatchCache, TorchCache

_BATCH_TOKENS = 2048  # computed at once, padding included


class TorchEngine:
    """A checkpoint computed by the trainable model, sequences in batches.

    Args:
        dtype: to which weights are rounded, as the engine would hold them. Computed is in float32; in bfloat16 where
            weights are and the processor has a unit for it (AMX), as the engine rounds activations there too.
    """

    closed = False
    max_rows = 4096

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.model = trainable(checkpoint, dtype=dtype).float()
        self.half = dtype == torch.bfloat16 and "amx_bf16" in cpu_flags()
        self.config = checkpoint.config
        self.num_routed = self.config.num_routed_layers
        self.vocab_size = self.config.vocab_size

    def new_cache(self, max_length: int) -> TorchCache:
        """As Engine.new_cache."""
        return TorchCache(self.config.num_hidden_layers, max_length)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        counts: Sequence[int],
        caches: Sequence[Any],
        *,
        routing: Routing = "router",
        mask: Tensor | None = None,
        thresholds: Tensor | None = None,
        logits_rows: Tensor | None = None,
    ) -> StepResult:
        """As Engine.forward, except that a mask is for one sequence and its beginning."""
        if mask is not None and (len(counts) != 1 or caches[0].length):
            raise UnsupportedError(
                f"eval: a routing mask for {len(counts)} sequences, {[c.length for c in caches]} tokens held; an "
                "ablated model takes one for one sequence from its beginning; leave the mask out"
            )
        forced = ForcedRouting(routing, self.num_routed, routing, recorded=mask)
        if logits_rows is None:
            logits_rows = torch.tensor(list(counts)).cumsum(0) - 1
        config = self.model.config
        own = config.router_thresholds
        if thresholds is not None:
            config.router_thresholds = thresholds.tolist()
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                hidden, gates, run = self._compute(token_ids, counts, caches, forced)
                logits = self.model.lm_head(hidden[logits_rows.long()]).float()
        finally:
            config.router_thresholds = own
        return StepResult(logits, gates, run)

    def _compute(
        self,
        token_ids: Tensor,
        counts: Sequence[int],
        caches: Sequence[TorchCache],
        forced: ForcedRouting,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(final hidden states, gates, run) of the rows of a call."""
        hidden = torch.empty(len(token_ids), self.config.hidden_size)
        gates = torch.empty(len(token_ids), self.num_routed)
        run = torch.empty(len(token_ids), self.num_routed, dtype=torch.uint8)
        rows = torch.split(torch.arange(len(token_ids)), list(counts))
        parts = [token_ids[own] for own in rows]
        for batch in _batches(counts):
            cache = BatchCache([caches[i] for i in batch], [counts[i] for i in batch])
            out = self.model.model(
                torch.nn.utils.rnn.pad_sequence([parts[i] for i in batch], batch_first=True),
                attention_mask=cache.visible(),
                position_ids=cache.positions(),
                past_key_values=cache,
                force_routing=forced,
            )
            cache.commit()
            for b, i in enumerate(batch):
                hidden[rows[i]] = out.last_hidden_state[b, : counts[i]].float()
                if self.num_routed:
                    gates[rows[i]] = out.gates[b, : counts[i]]
                    run[rows[i]] = out.run[b, : counts[i]].to(torch.uint8)
        return hidden, gates, run

    def sample(self, logits: Tensor, *, temperature: float, **_: Any) -> tuple[Tensor, Tensor]:
        """As Engine.sample, greedy alone."""
        if temperature:
            raise UnsupportedError(
                f"eval: temperature {temperature:g} of an ablated model, whose answers are greedy; give 0"
            )
        values, tokens = logits.max(-1)
        return tokens.int(), values - logits.logsumexp(-1)

    def close(self) -> None:
        """Nothing to give back."""


def _batches(counts: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of sequences with like counts of new tokens together, so that little is padding."""
    batch: list[int] = []
    for i in sorted(range(len(counts)), key=lambda i: counts[i]):
        if batch and (len(batch) + 1) * counts[i] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
