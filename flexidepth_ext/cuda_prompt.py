"""A pass of many rows: matrices are multiplied by torch's library, everything else is our kernels.

Only the rows that run a layer are gathered for it, so a prompt's time follows what it computes. The library has to know
how many they are: two numbers a routed layer come to the host. Inputs and results of matrices have the weights' type,
as in torch's own model; what is routed is computed in float32 as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda_ops import CudaOps
from .cuda_tensors import Decisions, RouterWeights
from .model_shape import DTYPES

if TYPE_CHECKING:
    from .cuda_engine import CudaEngine


@contextmanager
def whole_float32() -> Iterator[None]:
    """Within it torch multiplies float32 on CUDA as such: gates decide alike in prompts and in decoding, whether or not
    the caller lets torch round to TF32 elsewhere.

    torch since 2.9 has a setting with words for it; the older switch raises where a caller has used the newer."""
    settings = torch.backends.cuda.matmul
    newer = hasattr(settings, "fp32_precision")
    name, whole = ("fp32_precision", "ieee") if newer else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, whole)
    try:
        yield
    finally:
        setattr(settings, name, before)


@dataclass(frozen=True)
class PromptRows:
    """The rows of a pass, on the device: token_ids int32, positions int64, sequences int32 [rows]; tables int64
    [sequences]; max_pages that a row's past reaches."""

    token_ids: Tensor
    positions: Tensor
    sequences: Tensor
    tables: Tensor
    max_pages: int


@dataclass(frozen=True)
class PromptRouting:
    """mode: of `Engine.forward`. mask: uint8 [rows, routed layers] on the device, where that is forced. thresholds:
    one a routed layer. gates, ran: [rows, routed layers], written."""

    mode: str
    mask: Tensor | None
    thresholds: list[float]
    gates: Tensor
    ran: Tensor


class _Pages:
    """The caches of a pass as `CudaOps` takes them."""

    def __init__(self, engine: CudaEngine, rows: PromptRows) -> None:
        config = engine.config
        self.dtype, self.max_pages = engine.dtype, rows.max_pages
        self.num_kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.tables = rows.tables

    def argument(self, ops: CudaOps, layer: int) -> Any:
        """Of the compiled ops."""
        return ops.module.Pages(
            self.tables.data_ptr(), DTYPES[self.dtype], self.num_kv_heads, self.head_dim, layer
        )


class PromptPass:
    """One pass over an engine's weights."""

    def __init__(self, engine: CudaEngine, rows: PromptRows, routing: PromptRouting) -> None:
        self.engine, self.config, self.rows, self.routing = engine, engine.config, rows, routing
        self.ops = CudaOps(engine.runtime.module, engine.device.type)
        self.eps = float(engine.config.rms_norm_eps)
        self.pages: Any = _Pages(engine, rows)
        self.table = self.ops.rope_table(rows.positions, engine.inv_freq)
        self.h = self.ops.embed(rows.token_ids, self.weight("model.embed_tokens.weight"))
        self.routed = {layer: j for j, layer in enumerate(engine.config.routing_layers)}

    def weight(self, name: str) -> Tensor:
        """A tensor of the engine's."""
        return self.engine.weights[name]

    def run(self) -> Tensor:
        """The residual stream [rows, hidden] after the last layer."""
        for layer in range(self.config.num_hidden_layers):
            if layer in self.routed and self.routing.mode != "dense":
                self.routed_layer(layer)
            else:
                self.plain_layer(layer)
        return self.h

    def logits(self, rows: Tensor) -> Tensor:
        """Logits [n, vocab] of rows int32 [n], by our own kernel: there are few."""
        tied = self.config.tie_word_embeddings
        head = self.weight("model.embed_tokens.weight" if tied else "lm_head.weight")
        return self.ops.logits(self.h, self.weight("model.norm.weight"), head, self.eps, index=rows)

    def plain_layer(self, layer: int) -> None:
        """Every row runs."""
        x = self.normed(self.h, layer, "input_layernorm").to(self.engine.dtype)
        self.append(layer, x)
        self.attend(layer, x, None)
        self.feed_forward(layer, "mlp", None, None)

    def routed_layer(self, layer: int) -> None:
        """Rows run or skip, by their gates or by force."""
        x = self.normed(self.h, layer, "input_layernorm")
        inputs = x.to(self.engine.dtype)
        self.append(layer, inputs)
        decisions = self.decide(layer, x)
        run, skip = decisions.counts.tolist()
        if run:
            index = decisions.run_index[:run]
            self.attend(layer, inputs[index.long()], index)
            self.feed_forward(layer, "mlp", index, decisions.run_scale[:run])
        if skip:
            index = decisions.skip_index[:skip]
            self.feed_forward(layer, "adapter", index, decisions.skip_scale[:skip])

    def decide(self, layer: int, x: Tensor) -> Decisions:
        """Gates of x [rows, hidden] float32, and which rows run."""
        name, j, routing = f"model.layers.{layer}.router.", self.routed[layer], self.routing
        with whole_float32():
            encoded = F.linear(x, self.weight(name + "enc.weight"))
        strict = self.engine.strict_router
        router = RouterWeights(
            self.weight(name + "norm.weight"),
            folded=None if strict else self.weight(name + "folded"),
            dec=self.weight(name + "dec.weight") if strict else None,
            head=self.weight(name + "head.weight") if strict else None,
            bias=self.engine.router_biases[j],
            eps=self.eps,
            order=self.config.router_order,
        )
        gates = self.ops.router_gate(encoded, router)
        hard = routing.mode == "forced_hard" or self.config.gate == "straight_through"
        decisions = self.ops.compact(
            gates,
            routing.thresholds[j],
            forced=None if routing.mask is None else routing.mask[:, j].contiguous(),
            unit_scales=hard,
        )
        routing.gates[:, j] = gates
        routing.ran[:, j] = decisions.ran
        return decisions

    def normed(self, h: Tensor, layer: int, name: str) -> Tensor:
        """RMSNorm, float32."""
        return self.ops.rms_norm(h, self.weight(f"model.layers.{layer}.{name}.weight"), self.eps)

    def bias(self, name: str) -> Tensor | None:
        """Of a matrix that has one."""
        return self.engine.weights.get(name + ".bias")

    def product(self, x: Tensor, name: str) -> Tensor:
        """x W^T in the weights' type, without the bias."""
        return F.linear(x, self.weight(name + ".weight"))

    def whole_product(self, x: Tensor, name: str) -> Tensor:
        """x W^T + b, the result float32."""
        y, bias = self.product(x, name).float(), self.bias(name)
        return y if bias is None else y.add_(bias)

    def append(self, layer: int, x: Tensor) -> None:
        """Keys and values of every row into the cache."""
        name = f"model.layers.{layer}.self_attn."
        k = self.ops.rope(self.whole_product(x, name + "k_proj"), self.table)
        v = self.whole_product(x, name + "v_proj")
        self.ops.kv_append(self.pages, k, v, self.rows.positions, self.rows.sequences, layer=layer)

    def attend(self, layer: int, x: Tensor, index: Tensor | None) -> None:
        """Attention of the listed rows (None: all), whose inputs are x, onto the residual stream."""
        name = f"model.layers.{layer}.self_attn."
        q = self.ops.rope(self.whole_product(x, name + "q_proj"), self.table, index=index)
        out = self.ops.attention(
            q,
            self.pages,
            self.rows.positions,
            self.rows.sequences,
            self.config.num_attention_heads,
            index=index,
            layer=layer,
            sliding_window=self.config.sliding_window or 0,
            prompt=True,
        )
        self.add(out.to(self.engine.dtype), name + "o_proj", index, None)

    def feed_forward(
        self, layer: int, part: str, index: Tensor | None, scale: Tensor | None
    ) -> None:
        """The feed-forward, or the adapter, of the listed rows, weighed, onto the residual stream."""
        h = self.h if index is None else self.h[index.long()]
        x = self.normed(h, layer, "post_attention_layernorm").to(self.engine.dtype)
        name = f"model.layers.{layer}.{part}."
        gate, up = name + "gate_proj", name + "up_proj"
        activation = self.ops.silu_and_mul(
            self.product(x, gate), self.product(x, up), self.bias(gate), self.bias(up)
        )
        self.add(activation, name + "down_proj", index, scale)

    def add(self, x: Tensor, name: str, index: Tensor | None, scale: Tensor | None) -> None:
        """A matrix's product with x onto the listed rows of the residual stream."""
        self.ops.residual_add(
            self.h, self.product(x, name), bias=self.bias(name), index=index, scale=scale
        )


def torch_multiplies(engine: CudaEngine, rows: int) -> bool:
    """Whether a pass of so many rows is worth the library: half precision, and more rows than our kernels take at a
    time."""
    return engine.dtype != torch.float32 and rows > engine.own_rows
