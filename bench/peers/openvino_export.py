"""A saved transformers model as a stateful OpenVINO model: `python -m bench.peers.openvino_export FROM TO`.

Inputs, outputs and states are those that OpenVINO GenAI wants: input_ids, attention_mask and position_ids
[batch, tokens], beam_idx [batch]; logits [batch, tokens, vocabulary]; keys and values of each layer as variables.
optimum-intel does the same, but wants other versions of transformers and torch than this package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = ("input_ids", "attention_mask", "position_ids")


class _Step(torch.nn.Module):
    """The model as a function of its inputs and past keys and values, [batch, kv heads, past, head_dim] each."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of each layer."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.dtype, layer.device = keys.dtype, keys.device
            # Not by update: the empty tensor that it would begin with has no shape to trace.
            layer.keys, layer.values, layer.is_initialized = keys, values, True
            cache.layers.append(layer)
        # The whole mask, or transformers would trace one for this number of tokens alone.
        keys_at = torch.arange(attention_mask.shape[1])
        seen = (keys_at[None, None, :] <= position_ids[:, :, None]) & (attention_mask[:, None] > 0)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
        out = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        return (out.logits, *states)


def convert(source: Path, target: Path) -> None:
    """Read the saved model `source`, write openvino_model.xml and .bin into the folder `target`."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    config = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past, new = 5, 3  # tokens of the traced example
    example = (
        torch.ones(1, new, dtype=torch.long),
        torch.ones(1, past + new, dtype=torch.long),
        torch.arange(past, past + new)[None],
        *[torch.zeros(1, heads, past, head_dim) for _ in range(2 * layers)],
    )
    with torch.no_grad():
        converted = openvino.convert_model(_Step(model), example_input=example)
    states = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs = [*_NAMES, *(f"past_key_values.{state}" for state in states)]
    outputs = ["logits", *(f"present.{state}" for state in states)]
    for port, name in zip(converted.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        shape = [-1, -1] if name in _NAMES else [-1, heads, -1, head_dim]
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    for port, name in zip(converted.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    _reorder_by_beam(converted)
    pairs = dict(zip(inputs[len(_NAMES) :], outputs[1:], strict=True))
    apply_make_stateful_transformation(converted, pairs)
    _begin_empty(converted, heads, head_dim)
    converted.validate_nodes_and_infer_types()
    target.mkdir(parents=True)
    openvino.save_model(converted, target / "openvino_model.xml", compress_to_fp16=False)
    for name in ("config.json", "generation_config.json"):
        (target / name).write_bytes((source / name).read_bytes())


def _reorder_by_beam(model: Any) -> None:
    """Gather every state by beam_idx: the pattern by which the CPU plugin knows a key/value cache."""
    import numpy as np
    from openvino import PartialShape, opset13

    states = [port for port in model.inputs if port.get_any_name() not in _NAMES]
    beam = opset13.parameter(PartialShape([-1]), dtype=np.int32, name="beam_idx")
    beam.output(0).get_tensor().add_names({"beam_idx"})
    model.add_parameters([beam])
    for port in states:
        readers = port.get_target_inputs()
        gathered = opset13.gather(port.get_node(), beam, opset13.constant(0, dtype=np.int64))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
    model.validate_nodes_and_infer_types()


def _begin_empty(model: Any, heads: int, head_dim: int) -> None:
    """Every variable begins as [batch, heads, 0, head_dim]."""
    import numpy as np
    from openvino import opset13

    def constant(value: int | list[int]) -> Any:
        return opset13.constant(value, dtype=np.int64)

    shape = opset13.shape_of(model.input("input_ids"), output_type="i64")
    batch = opset13.gather(shape, constant([0]), constant(0))
    for op in model.get_ops():
        if op.get_type_name() == "ReadValue":
            dims = opset13.concat(
                [batch, constant([heads]), constant([0]), constant([head_dim])], 0
            )
            empty = opset13.broadcast(opset13.constant(0.0, dtype=np.float32), dims)
            op.set_arguments([empty])


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
