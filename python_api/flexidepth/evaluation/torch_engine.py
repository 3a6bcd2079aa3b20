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
from .token_tree import TokenTree, plant_trees

_BATCH_TOKENS = 2048  # computed at once, padding included


class TokenHistory:
    """Stands for an engine's cache: tokens, which are computed again with each that follows them."""

    def __init__(self) -> None:
        self.ids: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.ids)

    def copy_from(self, other: TokenHistory) -> None:
        """Hold what `other` holds."""
        self.ids = other.ids

    def release(self) -> None:
        """Forget everything."""
        self.ids = ()


class TorchEngine:
    """A checkpoint computed without keys and values of earlier calls, which some ablations do not have.

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

    def new_cache(self, _: int) -> TokenHistory:
        """As Engine.new_cache."""
        return TokenHistory()

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
        parts = [tuple(part.tolist()) for part in torch.split(token_ids, list(counts))]
        trees = plant_trees(
            [cache.ids for cache in caches], parts, joined=self.config.sliding_window is None
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
                hidden, gates, run = self._compute(trees, len(token_ids), forced)
                logits = self.model.lm_head(hidden[logits_rows.long()]).float()
        finally:
            config.router_thresholds = own
        for cache, part in zip(caches, parts, strict=True):
            cache.ids += part
        return StepResult(logits, gates, run)

    def _compute(
        self, trees: Sequence[TokenTree], rows: int, forced: ForcedRouting
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(final hidden states, gates, run) of the rows of a call."""
        hidden = torch.empty(rows, self.config.hidden_size)
        gates = torch.empty(rows, self.num_routed)
        run = torch.empty(rows, self.num_routed, dtype=torch.uint8)
        for batch in _batches(trees):
            length = max(len(tree.ids) for tree in batch)
            out = self.model.model(
                torch.stack([tree.padded_ids(length) for tree in batch]),
                attention_mask=torch.stack([tree.visible(length) for tree in batch])[:, None],
                position_ids=torch.stack([tree.positions(length) for tree in batch]),
                use_cache=False,
                force_routing=forced,
            )
            for b, tree in enumerate(batch):
                new = slice(tree.root, len(tree.ids))
                hidden[tree.rows] = out.last_hidden_state[b, new]
                if self.num_routed:
                    gates[tree.rows] = out.gates[b, new]
                    run[tree.rows] = out.run[b, new].to(torch.uint8)
        return hidden, gates, run

    def close(self) -> None:
        """Nothing to give back."""


def _batches(trees: Sequence[TokenTree]) -> Iterator[list[TokenTree]]:
    """Trees of like lengths together, so that little is padding."""
    batch: list[TokenTree] = []
    for tree in sorted(trees, key=lambda tree: len(tree.ids)):
        if batch and (len(batch) + 1) * len(tree.ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch
