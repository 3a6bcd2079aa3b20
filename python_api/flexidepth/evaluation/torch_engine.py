"""What evaluation asks of the engine, answered by the trainable model: for ablations, which the engine does not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexidepth_ext.engine import StepResult
from flexidepth_ext.forward_arguments import Routing

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.trainable import trainable
from ..errors import UnsupportedError
from ..routing import ForcedRouting


class EmptyCache:
    """Stands for an engine's cache; holds no keys and values, so tokens can be put to it only once."""

    def __init__(self) -> None:
        self.length = 0

    def release(self) -> None:
        """Forget everything."""
        self.length = 0


class TorchEngine:
    """A checkpoint whose whole sequences can be computed, without a cache.

    Args:
        dtype: to which weights are rounded, as the engine would hold them; computed is in float32.
    """

    closed = False

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.model = trainable(checkpoint, dtype=dtype).float()
        self.config = checkpoint.config
        self.num_routed = self.config.num_routed_layers
        self.max_rows = int(self.config.max_position_embeddings)  # so that no sequence is cut

    def new_cache(self, _: int) -> EmptyCache:
        """As Engine.new_cache."""
        return EmptyCache()

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
        """As Engine.forward, for one sequence at a time and from its beginning."""
        if len(counts) != 1 or caches[0].length:
            raise UnsupportedError(
                f"eval: {len(counts)} sequences, {[c.length for c in caches]} tokens held; an ablated model is "
                "computed a whole sequence at a time; measure it on texts alone"
            )
        caches[0].length = len(token_ids)
        config = self.model.config
        own = config.router_thresholds
        if thresholds is not None:
            config.router_thresholds = thresholds.tolist()
        try:
            out = self.model.model(
                token_ids[None].long(),
                use_cache=False,
                force_routing=ForcedRouting(routing, self.num_routed, routing, recorded=mask),
            )
        finally:
            config.router_thresholds = own
        rows = [len(token_ids) - 1] if logits_rows is None else logits_rows.tolist()
        logits = self.model.lm_head(out.last_hidden_state[0, rows])
        return StepResult(logits, out.gates[0], out.run[0].to(torch.uint8))

    def close(self) -> None:
        """Nothing to give back."""
