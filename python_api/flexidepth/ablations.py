"""What the paper takes away from FlexiDepth to see what it is there for (arXiv 2503.23798, section 4.3).

`FlexiDepthConfig.ablations` holds any of these names; the trainable model obeys them, the engine does not.
Several together make other methods: a linear router that skips attention alone and keeps no keys and values of
skipped tokens is MindSkip's (arXiv 2410.13184), with a decision a token. Much of the attention goes to a text's first
token (an attention sink, arXiv 2309.17453): no_skipped_kv_but_first tells what is lost with that from the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import reference
from .config import FlexiDepthConfig, has_adapter, keeps_skipped_kv
from .errors import UnsupportedError
from .layers import Decision, DecoderLayer, StepInputs, rows_of


class LinearRouter(nn.Module):
    """w = sigmoid(W_head x + b): a router without a hidden layer."""

    def __init__(self, config: FlexiDepthConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.hidden_size, 1, bias=config.router_bias)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """[..., d] -> [...] in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return reference.linear_gate(x, self.head.weight, self.head.bias, offset=offset)


class AblatedLayer(DecoderLayer):
    """A layer of a model with ablations."""

    def __init__(self, config: FlexiDepthConfig, index: int) -> None:
        super().__init__(config, index)
        self.ablations: Collection[str] = frozenset(config.ablations)
        if self.routed and "linear_router" in self.ablations:
            self.router = LinearRouter(config)  # type: ignore[assignment]
        if self.routed and not has_adapter(config.ablations):
            del self.adapter

    def forward(
        self, h: Tensor, step: StepInputs, threshold: Tensor, decision: Decision
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As DecoderLayer's; UnsupportedError where keys and values are forgotten and a cache keeps no decisions."""
        forgets = self.routed and not decision.dense and not keeps_skipped_kv(self.ablations)
        if forgets and step.cache is not None and not hasattr(step.cache, "update_ran"):
            raise UnsupportedError(
                f"forward: a model without keys and values of skipped tokens and a {type(step.cache).__name__}, which "
                "does not keep which tokens skipped a layer; give use_cache=False"
            )
        return super().forward(h, step, threshold, decision)

    def _one_path(
        self,
        h: Tensor,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        step: StepInputs,
        run: Tensor,
        scales: Sequence[Tensor],
    ) -> Tensor:
        return self._path(h, x, keys, values, self._seen(step, run), run, scales)

    @torch.no_grad()
    def _difference(
        self,
        h: Tensor,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        step: StepInputs,
        run: Tensor,
        out: Tensor,
        of_running: bool,
    ) -> Tensor:
        """As DecoderLayer's: of the counted tokens alone the path that they did not take is computed."""
        counted = torch.ones_like(run) if of_running else ~run
        one = torch.ones(run.shape, device=run.device)
        seen = self._seen(step, run)
        # Straight-through: outputs unscaled, whichever path.
        other = self._path(h, x, keys, values, seen, ~run, (one, one), counted)
        sign = run.to(h.dtype) * 2 - 1
        return (out - other) * (sign * counted)[..., None]

    def _path(
        self,
        h: Tensor,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        step: StepInputs,
        run: Tensor,
        scales: Sequence[Tensor],
        computed: Tensor | None = None,
    ) -> Tensor:
        """Each token through its own path alone; h of those that are not among `computed`, None = all are."""
        every = torch.ones_like(run) if computed is None else computed
        attends = every if "feed_forward_only" in self.ablations else run & every
        feeds = every if "attention_only" in self.ablations else run & every
        fed, adapted = (scale.flatten()[:, None].to(h.dtype) for scale in scales)
        out = h.flatten(0, 1)
        if len(rows := rows_of(attends)):
            change = self.self_attn.selected(x, attends, keys, values, step)
            if "attention_only" in self.ablations:
                change = change * fed.index_select(0, rows)
            out = out.index_add(0, rows, change.to(h.dtype))
        y = self.post_attention_layernorm(out)
        if len(rows := rows_of(feeds)):
            change = self.mlp(y.index_select(0, rows))
            if "attention_only" not in self.ablations:
                change = change * fed.index_select(0, rows)
            out = out.index_add(0, rows, change.to(h.dtype))
        if len(rows := rows_of(every & ~feeds)) and has_adapter(self.ablations):
            change = adapted.index_select(0, rows) * self.adapter(y.index_select(0, rows))
            out = out.index_add(0, rows, change.to(h.dtype))
        return out.view_as(h)

    def _seen(self, step: StepInputs, run: Tensor) -> StepInputs:
        """Without keys and values of skipped tokens where they are ablated; a token still sees itself."""
        if keeps_skipped_kv(self.ablations):
            return step
        tokens = run.shape[1]
        ran = run if step.cache is None else step.cache.update_ran(run, self.self_attn.layer)
        slots = torch.arange(ran.shape[1], device=run.device)
        own = slots[-tokens:, None] == slots
        kept = ran[:, None, :] | own
        if "no_skipped_kv_but_first" in self.ablations:
            kept = kept | (slots == step.mask.int().argmax(-1, keepdim=True))
        return replace(step, mask=step.mask & kept)
