"""The trainable transformers model: the executable specification of what the engine computes.

Importing this module registers it with transformers' Auto classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from . import reference
from .ablations import AblatedLayer
from .base_model import base_state
from .checkpoints.model_saving import SurvivingSave
from .config import FlexiDepthConfig
from .dial import check_thresholds
from .errors import InternalError, UnsupportedError, ValueOutOfRangeError
from .initialization import initial_routing, is_routing
from .layers import Decision, DecoderLayer, RMSNorm, StepInputs
from .model_inputs import check_arguments, check_attention_mask, token_positions, visible_keys
from .routing import ForcedRouting, ForceRouting, resolve_force_routing

# Before version 5 transformers wanted a list of tied names, since then a map to what they are tied to.
_TIED: Any = {"lm_head.weight": "model.embed_tokens.weight"}
if int(transformers.__version__.split(".")[0]) < 5:
    _TIED = ["lm_head.weight"]


@dataclass
class FlexiDepthOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    """gates: float32 [batch, tokens, routed layers] (NaN when dense); run: bool, same shape.

    base_hidden_state: last_hidden_state of the base model on the same tokens, where it was asked for.
    credit: float32, shape of gates, how much each gate learns while exploring (layers._explore), else None.
    """

    gates: Tensor | None = None
    run: Tensor | None = None
    base_hidden_state: Tensor | None = None
    credit: Tensor | None = None


@dataclass
class FlexiDepthCausalLMOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """gates: float32 [batch, tokens, routed layers] (NaN when dense); run: bool, same shape."""

    gates: Tensor | None = None
    run: Tensor | None = None


class FlexiDepthPreTrainedModel(SurvivingSave, PreTrainedModel):  # type: ignore[misc]
    """What the two models share: configuration, initialisation, saving, checkpointing."""

    config_class = FlexiDepthConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "AblatedLayer"]  # noqa: RUF012  (transformers' own form)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: the forward pass asks for gradients from the first layer that trains on. From the
        embeddings on, as checkpointing wants it elsewhere, the frozen layers below would run twice."""


class FlexiDepthModel(FlexiDepthPreTrainedModel):
    """Token ids to final hidden states.

    Each token takes its own path alone. In training a straight-through gate, whose derivative needs what the
    other path would have changed, has that computed as well, without gradients.
    """

    def __init__(self, config: FlexiDepthConfig) -> None:
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kind = AblatedLayer if config.ablations else DecoderLayer
        self.layers = nn.ModuleList(kind(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_base_hidden_state: bool = False,
        gate_offset: Tensor | None = None,
        force_routing: ForceRouting | ForcedRouting = None,
        **kwargs: Any,
    ) -> FlexiDepthOutput:
        """Run the layers.

        Args:
            input_ids: int64 [batch, tokens], or inputs_embeds [batch, tokens, d].
            attention_mask: [batch, past + tokens], 0 = padding on either side; or [batch, 1, tokens, keys].
            position_ids: [batch, tokens]; None = counted over the unpadded tokens.
            past_key_values: a transformers Cache.
            output_base_hidden_state: also what the base model makes of the tokens, without gradients; the
                layers before the first routed one are computed once for both.
            gate_offset: float32 [batch], taken off the logit of every gate of a sequence, w =
                sigmoid(logit - offset): with thresholds of 1/2 the same decisions as without it and
                thresholds of sigmoid(offset).
            force_routing: see flexidepth.routing.resolve_force_routing; masks go by position.

        Raises:
            ShapeError: an attention mask or a routing mask that does not cover the tokens.
            ValueOutOfRangeError: an unknown argument; a cache while checkpointing gradients or beside
                output_base_hidden_state.
        """
        check_arguments(kwargs, _ARGUMENTS)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueOutOfRangeError(
                f"forward: {'neither' if input_ids is None else 'both'} of input_ids and inputs_embeds; "
                "give one of them"
            )
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = h.shape[:2]
        if isinstance(attention_mask, dict):
            # One mask per kind of layer; all of ours are of one kind.
            attention_mask = next(iter(attention_mask.values()))
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointing and (use_cache or past_key_values is not None):
            raise ValueOutOfRangeError(
                "forward: a cache while checkpointing gradients, which computes layers again and would "
                "fill it twice; give use_cache=False and no past_key_values"
            )
        if output_base_hidden_state and (use_cache or past_key_values is not None):
            raise ValueOutOfRangeError(
                "forward: a cache beside output_base_hidden_state, which two passes would fill; give "
                "use_cache=False and no past_key_values"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        check_attention_mask(attention_mask, batch, past, tokens)
        if position_ids is None:
            position_ids = token_positions(attention_mask, batch, past, tokens, h.device)
        position_ids = position_ids.expand(batch, -1)
        inv_freq = reference.rope_inv_freq(self.config.head_dim, self.config.rope_parameters)
        cos, sin = reference.rope_cos_sin(position_ids, inv_freq, h.dtype)
        mask = visible_keys(
            attention_mask, batch, past, tokens, self.config.sliding_window, h.device
        )
        step = StepInputs(cos, sin, mask, past_key_values, gate_offset)
        decisions = self._decisions(force_routing, position_ids)
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        return self._through_layers(
            h, step, decisions, checkpointing, output_hidden_states, output_base_hidden_state
        )

    def _through_layers(
        self,
        h: Tensor,
        step: StepInputs,
        decisions: Callable[[int], Decision],
        checkpointing: bool,
        output_hidden_states: bool,
        output_base_hidden_state: bool,
    ) -> FlexiDepthOutput:
        """Every layer and the last norm; decisions by number of routed layer."""
        check_thresholds(self.config.router_thresholds, self.config.num_routed_layers)
        thresholds = torch.tensor(
            self.config.router_thresholds, dtype=torch.float32, device=h.device
        )
        hidden = [h]
        gates: list[Tensor] = []
        runs: list[Tensor] = []
        base: Tensor | None = None
        for index, layer in enumerate(self.layers):
            routed = len(gates)
            threshold = thresholds[routed] if layer.routed else thresholds
            if output_base_hidden_state and base is None and layer.routed:
                base = self._base_from(index, h, step)
            arguments = (h, step, threshold, decisions(routed))
            if checkpointing and not h.requires_grad and _trains(layer):
                # Reentrant checkpointing differentiates only what a layer's inputs lead to, and behind
                # frozen layers that would be nothing.
                h = h.detach().requires_grad_()
                arguments = (h, *arguments[1:])
            if checkpointing and h.requires_grad:
                h, gate, run = self._gradient_checkpointing_func(layer.__call__, *arguments)
            else:
                h, gate, run = layer(*arguments)
            if layer.routed:
                gates.append(gate)
                runs.append(run)
            if output_hidden_states:
                hidden.append(h)
        h = self.norm(h)
        # As in transformers, the last of the hidden states is the normed one.
        return FlexiDepthOutput(
            last_hidden_state=h,
            past_key_values=step.cache,
            hidden_states=(*hidden[:-1], h) if output_hidden_states else None,
            gates=torch.stack(gates, -1) if gates else None,
            run=torch.stack(runs, -1) if runs else None,
            credit=torch.stack([step.credits[i] for i in sorted(step.credits)], -1)
            if step.credits
            else None,
            base_hidden_state=h.detach() if output_base_hidden_state and base is None else base,
        )

    @torch.no_grad()
    def _base_from(self, index: int, h: Tensor, step: StepInputs) -> Tensor:
        """What the base model's layers from `index` on, and the last norm, make of their input h."""
        unrouted = Decision(dense=True)
        for layer in self.layers[index:]:
            h, _, _ = layer(h, step, h.new_zeros(()), unrouted)
        normed: Tensor = self.norm(h)
        return normed

    def _decisions(
        self, force: ForceRouting | ForcedRouting, positions: Tensor
    ) -> Callable[[int], Decision]:
        """A function from the number of a routed layer to its Decision."""
        forced = (
            force if isinstance(force, ForcedRouting) else resolve_force_routing(force, self.config)
        )
        if forced.mode == "router":
            return lambda _: Decision()
        if forced.mode == "dense":
            return lambda _: Decision(dense=True)
        first = int(positions.min())
        table = forced.rows(first, int(positions.max()) + 1)
        if table is None:
            raise InternalError(f"forward: mode {forced.mode!r} has no mask")
        run = table.to(positions.device).bool()[positions - first]
        unit = forced.mode == "forced_hard"
        # Layers behind the last routed one ask too, and do not look at the answer.
        return lambda j: Decision(run[..., j], unit) if j < run.shape[-1] else Decision()


class FlexiDepthForCausalLM(FlexiDepthPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """FlexiDepthModel with an LM head; trains, generates, saves as any transformers model.

    Outputs carry `gates` and `run` of every routed layer, from which a trainer takes the layer penalty.
    """

    _tied_weights_keys = _TIED

    def __init__(self, config: FlexiDepthConfig) -> None:
        super().__init__(config)
        self.model = FlexiDepthModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_base_model(cls, base: Any, *, seed: int = 0, **routing: Any) -> FlexiDepthForCausalLM:
        """A model with the weights of a transformers Llama, Qwen2 or Mistral causal LM and seeded routing.

        Args:
            base: the base model; its weights are copied.
            seed: of routers and adapters (flexidepth.initialization).
            routing: routing arguments of FlexiDepthConfig.

        Raises:
            UnsupportedError: another architecture, or tensors that this one does not have.
        """
        config = FlexiDepthConfig.from_base(base.config, **routing)
        model: FlexiDepthForCausalLM = cls(config).to(base.device, base.dtype)
        state = base_state(base) | dict(initial_routing(config, seed))
        missing, unexpected = model.load_state_dict(state, strict=False)
        missing = [
            name
            for name in missing
            if not (name == "lm_head.weight" and config.tie_word_embeddings)
        ]
        if missing or unexpected:
            raise UnsupportedError(
                f"from_base_model: {type(base).__name__} lacks {missing or 'nothing'}, has {unexpected or 'nothing'} "
                "too much; wanted the tensors of transformers' own class: merge adapters, undo quantisation first"
            )
        model.tie_weights()
        model.eval()
        return model

    def freeze_base(self) -> None:
        """Leave only routers and adapters trainable, as the method trains."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_routing(name))

    def sample_gates(self, on: bool = True) -> None:
        """In training, draw decisions from the gates and use SparseMixer's estimator (reference.sampled_scales).

        Raises:
            UnsupportedError: a straight-through gate, which has no multipliers to estimate with.
        """
        if on and self.config.gate != "multiplier":
            raise UnsupportedError(
                f"sample_gates: this model's gate is {self.config.gate!r}; SparseMixer weighs outputs by their "
                "probabilities and needs gate='multiplier'"
            )
        for layer in self.routed_layers():
            layer.sampled_gates = on

    def explore_skips(self, share: float) -> None:
        """In training, draw this share of the running gates to skip, and let gates learn where they skip.

        Raises:
            UnsupportedError: a multiplier gate. ValueOutOfRangeError: a share outside [0, 1).
        """
        if not 0 <= share < 1:
            raise ValueOutOfRangeError(f"explore_skips: share is {share}; wanted 0 to below 1")
        if share and self.config.gate != "straight_through":
            raise UnsupportedError(
                f"explore_skips: this model's gate is {self.config.gate!r}; it needs gate='straight_through'"
            )
        for layer in self.routed_layers():
            layer.exploration = share

    def routed_layers(self) -> list[DecoderLayer]:
        """The layers with a router, from the first on."""
        return [self.model.layers[i] for i in self.config.routing_layers]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        gate_offset: Tensor | None = None,
        force_routing: ForceRouting | ForcedRouting = None,
        **kwargs: Any,
    ) -> FlexiDepthCausalLMOutput:
        """Logits [batch, tokens, vocab], and the mean next-token loss when labels are given (-100 = ignored).

        logits_to_keep: how many last tokens get logits, 0 = all; or their numbers. Other arguments as for
        FlexiDepthModel.
        `num_items_in_batch` (from the Trainer) replaces the number of labels in the mean.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            gate_offset=gate_offset,
            force_routing=force_routing,
            **kwargs,
        )
        keep = (
            slice(-logits_to_keep, None)
            if isinstance(logits_to_keep, int) and logits_to_keep
            else slice(None)
        )
        if isinstance(logits_to_keep, Tensor):
            logits = self.lm_head(out.last_hidden_state[:, logits_to_keep])
        else:
            logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = _next_token_loss(logits, labels, num_items)
        return FlexiDepthCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            gates=out.gates,
            run=out.run,
        )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _next_token_loss(logits: Tensor, labels: Tensor, num_items: Any | None) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    flat = wide[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(flat.device)
    if num_items is None:
        return F.cross_entropy(flat, targets, ignore_index=-100)
    total: Tensor = F.cross_entropy(flat, targets, ignore_index=-100, reduction="sum") / num_items
    return total


_ARGUMENTS = tuple(inspect.signature(FlexiDepthForCausalLM.forward).parameters)[1:-1]

AutoConfig.register("flexidepth", FlexiDepthConfig, exist_ok=True)
AutoModel.register(FlexiDepthConfig, FlexiDepthModel, exist_ok=True)
AutoModelForCausalLM.register(FlexiDepthConfig, FlexiDepthForCausalLM, exist_ok=True)
