"""Modules of the trainable model, built from the functions of flexidepth.reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import reference
from .config import FlexiDepthConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight [width]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


class Router(nn.Module):
    """Gate weight of a layer from its normed input; see reference.router_gate."""

    def __init__(self, config: FlexiDepthConfig) -> None:
        super().__init__()
        self.order, self.eps = config.router_order, config.rms_norm_eps
        self.enc = nn.Linear(config.hidden_size, config.router_dim, bias=False)
        self.norm = RMSNorm(config.router_dim, config.rms_norm_eps)
        self.dec = nn.Linear(config.router_dim, config.hidden_size, bias=False)
        self.head = nn.Linear(config.hidden_size, 1, bias=config.router_bias)

    def forward(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """[..., d] -> [...] in float32, whatever mixed precision is on around it."""
        with torch.autocast(x.device.type, enabled=False):
            return reference.router_gate(
                x,
                self.enc.weight,
                self.norm.weight,
                self.dec.weight,
                self.head.weight,
                self.head.bias,
                eps=self.eps,
                order=self.order,
                offset=offset,
            )


class GatedMLP(nn.Module):
    """SwiGLU: the feed-forward, and with a narrow width the adapter."""

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, y: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return reference.gated_mlp(
            y, gate.weight, up.weight, down.weight, (gate.bias, up.bias, down.bias)
        )


class Attention(nn.Module):
    """Grouped-query attention in two halves, because keys and values are needed of every token."""

    def __init__(self, config: FlexiDepthConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        d, dim = config.hidden_size, config.head_dim
        inputs = config.qkv_bias or config.attention_bias
        self.q_proj = nn.Linear(d, config.num_attention_heads * dim, bias=inputs)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * dim, bias=inputs)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * dim, bias=inputs)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, d, bias=config.attention_bias)

    def heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads * dim] -> [batch, heads, tokens, dim]."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def keys_values(self, x: Tensor, step: StepInputs) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of the new tokens, joined with those in the cache."""
        k = reference.apply_rope(self.heads(self.k_proj(x)), step.cos[:, None], step.sin[:, None])
        v = self.heads(self.v_proj(x))
        if step.cache is None:
            return k, v
        held = step.mask.shape[-1]
        # Since version 5 transformers' static cache counts for itself; before, it was told where to write.
        slots = torch.arange(held - k.shape[2], held, device=k.device)
        keys, values = step.cache.update(k, v, self.layer, {"cache_position": slots})
        # A static cache returns its unused slots as well.
        return keys[:, :, :held], values[:, :, :held]

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, step: StepInputs) -> Tensor:
        """Attention output of every token of x [batch, tokens, d]."""
        q = reference.apply_rope(self.heads(self.q_proj(x)), step.cos[:, None], step.sin[:, None])
        group = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=step.mask[:, None])
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def selected(
        self, x: Tensor, run: Tensor, keys: Tensor, values: Tensor, step: StepInputs
    ) -> Tensor:
        """Attention output [running, d] of the tokens where run [batch, tokens] is true, and of no others."""
        if x.device.type != "cpu":
            return self._selected_together(x, run, keys, values, step)
        outputs = []
        for b in range(x.shape[0]):
            rows = run[b].nonzero().flatten()
            if len(rows):
                own = StepInputs(
                    step.cos[b : b + 1, rows],
                    step.sin[b : b + 1, rows],
                    step.mask[b : b + 1, rows],
                )
                outputs.append(self(x[b : b + 1, rows], keys[b : b + 1], values[b : b + 1], own)[0])
        return torch.cat(outputs) if outputs else x.new_empty(0, x.shape[-1])

    def _selected_together(
        self, x: Tensor, run: Tensor, keys: Tensor, values: Tensor, step: StepInputs
    ) -> Tensor:
        """As `selected`, in one call: shorter selections are filled up with tokens that are thrown away."""
        counts = run.sum(1)
        most = int(counts.max())
        if not most:
            return x.new_empty(0, x.shape[-1])
        # The running tokens of each sequence first, in their order.
        rows = run.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        batch = torch.arange(len(rows), device=x.device)[:, None]
        own = StepInputs(step.cos[batch, rows], step.sin[batch, rows], step.mask[batch, rows])
        taken = torch.arange(most, device=x.device) < counts[:, None]
        out: Tensor = self(x[batch, rows], keys, values, own)
        return out[taken]


@dataclass
class StepInputs:
    """What every layer needs: cos and sin [batch, tokens, head_dim], mask [batch, tokens, keys], cache,
    gate_offset [batch] (taken off the logits of gates). credits: what layers note down, see _credit."""

    cos: Tensor
    sin: Tensor
    mask: Tensor
    cache: Any | None = None
    gate_offset: Tensor | None = None
    credits: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Decision:
    """Forced decisions of one layer: run [batch, tokens] or None; unit: outputs unscaled; dense: no router."""

    run: Tensor | None = None
    unit: bool = False
    dense: bool = False


class DecoderLayer(nn.Module):
    """A layer of the base model, with router and adapter where it is routed."""

    def __init__(self, config: FlexiDepthConfig, index: int) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.input_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.mlp = GatedMLP(d, f, config.mlp_bias)
        self.straight_through = config.gate == "straight_through"
        self.sampled_gates = False  # in training, draw decisions; see reference.sampled_scales
        self.exploration = (
            0.0  # in training, share of running tokens that skip to see what it costs
        )
        self.routed = index in config.routing_layers
        if self.routed:
            self.router = Router(config)
            self.adapter = GatedMLP(d, config.adapter_dim)

    def forward(
        self, h: Tensor, step: StepInputs, threshold: Tensor, decision: Decision
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(output [batch, tokens, d], gates, run) of a layer; the last two are None where it is not routed."""
        x = self.input_layernorm(h)
        keys, values = self.self_attn.keys_values(x, step)
        if not self.routed or decision.dense:
            h = h + self.self_attn(x, keys, values, step)
            h = h + self.mlp(self.post_attention_layernorm(h))
            if not self.routed:
                return h, None, None
            full = h.new_ones(h.shape[:2], dtype=torch.float32)
            return h, full * float("nan"), full.bool()
        offset = None if step.gate_offset is None else step.gate_offset[:, None]
        gates = self.router(x, offset)
        if decision.run is None and self.sampled_gates and self.training:
            run, *scales = reference.sampled_scales(gates)
        else:
            run = reference.decide(gates, threshold) if decision.run is None else decision.run
            unit = decision.unit or self.straight_through
            scales = list(reference.gate_scales(gates, run, unit=unit))
        # A multiplier's derivative needs no more than the path that was taken; a straight-through gate's
        # needs what the other one would have changed.
        learning = self.training and self.straight_through and not decision.unit
        credit = None
        if learning and self.exploration and decision.run is None:
            run, credit = _explore(run, self.exploration)
            step.credits[self.self_attn.layer] = credit
            scales = list(reference.gate_scales(gates, run, unit=True))
        out = self._one_path(h, x, keys, values, step, run, scales)
        if learning and gates.requires_grad:
            slope = self._difference(h, x, keys, values, step, run, out, credit is None)
            if credit is not None:
                slope = slope * (0.5 * credit)[..., None].to(h.dtype)
            out = out + (gates - gates.detach())[..., None].to(h.dtype) * slope
        return out, gates, run

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
        """Each token through its own path alone; scales [batch, tokens] of feed-forward and adapter."""
        fed, adapted = scales
        ran, skipped = rows_of(run), rows_of(~run)
        out = h.flatten(0, 1)
        if len(ran):
            attended = self.self_attn.selected(x, run, keys, values, step)
            out = out.index_add(0, ran, attended.to(h.dtype))
        y = self.post_attention_layernorm(out)
        if len(ran):
            scale = fed.flatten().index_select(0, ran)[:, None].to(h.dtype)
            change = scale * self.mlp(y.index_select(0, ran))
            out = out.index_add(0, ran, change.to(h.dtype))
        if len(skipped):
            scale = adapted.flatten().index_select(0, skipped)[:, None].to(h.dtype)
            change = scale * self.adapter(y.index_select(0, skipped))
            out = out.index_add(0, skipped, change.to(h.dtype))
        return out.view_as(h)

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
        """Output of the layer had each token run it, less its output had each token skipped it: [batch, tokens, d].

        Half of it is known: out has each token's own path. The straight-through gate's backward pass takes
        h + skip + w * (run - skip) for the output, w the gate (Bengio et al., arXiv 1308.3432). 0 for running
        tokens unless of_running.
        """
        ran, skipped = rows_of(run), rows_of(~run)
        inputs, own = h.flatten(0, 1), out.flatten(0, 1)
        difference = torch.zeros_like(own)
        if of_running and len(ran):
            before = inputs.index_select(0, ran)
            other = before + self.adapter(self.post_attention_layernorm(before))
            difference[ran] = own.index_select(0, ran) - other
        if len(skipped):
            other = inputs.index_select(0, skipped)
            other = other + self.self_attn.selected(x, ~run, keys, values, step)
            other = other + self.mlp(self.post_attention_layernorm(other))
            difference[skipped] = other - own.index_select(0, skipped)
        return difference.view_as(h)


_EXPLORED_CREDIT = 4.0


def _explore(run: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(run with a share of it drawn to skip, credit of each gate), both [batch, tokens].

    A loss that the base model minimises, as KL to it, is near L(w) = c (1 - w)^2 along a gate that runs (w = 1)
    or skips (w = 0): what skipping costs is c, and the slope is 0 where the layer runs and 2 c where it is
    skipped. Followed on both sides it draws every gate to its threshold, whatever c. So gates learn where they
    skip, from half the slope; those that would run are drawn now and then, and count for more the fewer they are.
    """
    explored = run & (torch.rand(run.shape, device=run.device) < share)
    run = run & ~explored
    credit = (~run).float() + (_EXPLORED_CREDIT - 1) * explored
    return run, credit


def rows_of(chosen: Tensor) -> Tensor:
    """Numbers of the chosen tokens among all tokens of the batch."""
    return chosen.flatten().nonzero().flatten()
