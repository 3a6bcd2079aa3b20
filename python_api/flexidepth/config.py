"""Configuration of a FlexiDepth model: a Llama-family base plus routing of its later layers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .errors import UnsupportedError, ValueOutOfRangeError

ROUTER_ORDERS = ("norm_tanh", "tanh_norm")
GATES = ("multiplier", "straight_through")
BASE_MODEL_TYPES = ("llama", "qwen2", "mistral")
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
}


class FlexiDepthConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the base model and how its layers are routed.

    Args:
        base_model_type: "llama", "qwen2" or "mistral".
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads, head_dim, max_position_embeddings, rms_norm_eps, tie_word_embeddings:
            as in transformers' configuration of the base model.
        rope_parameters: {"rope_theta": ..., "rope_type": "default" | "llama3" | "linear", ...}, as in
            transformers 5.
        attention_bias: biases on q, k, v and o. qkv_bias: biases on q, k and v alone. mlp_bias: on
            gate, up and down.
        sliding_window: tokens a query sees, itself included; None = all.
        routing_layers: 0-based layers with a router; None = the last half, [] = a plain model.
        router_reduction_factor: router width d_r = hidden_size // factor.
        adapter_reduction_factor: adapter width = intermediate_size // factor.
        router_order: "norm_tanh": z = tanh(Norm(W x)), as released; "tanh_norm": z = Norm(tanh(W x)),
            as in the paper (arXiv 2503.23798).
        router_bias: whether the router's logit has a bias.
        gate: "multiplier": feed-forward scaled by w, adapter by 1 - w; "straight_through": unscaled.
        router_thresholds: tau per routed layer, or one for all; a token runs a layer when w > tau.

    Raises:
        ValueOutOfRangeError: a value outside its range. UnsupportedError: a variant not implemented.
    """

    model_type = "flexidepth"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (transformers' own form)

    def __init__(
        self,
        base_model_type: str = "llama",
        vocab_size: int = 49152,
        hidden_size: int = 576,
        intermediate_size: int = 1536,
        num_hidden_layers: int = 30,
        num_attention_heads: int = 9,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        qkv_bias: bool = False,
        mlp_bias: bool = False,
        sliding_window: int | None = None,
        routing_layers: Sequence[int] | None = None,
        router_reduction_factor: int = 16,
        adapter_reduction_factor: int = 16,
        router_order: str = "norm_tanh",
        router_bias: bool = False,
        gate: str = "multiplier",
        router_thresholds: float | Sequence[float] = 0.5,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("layer_types", None)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.base_model_type = base_model_type
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            **(rope_parameters or {}),
        }
        self.attention_bias = attention_bias
        self.qkv_bias = qkv_bias
        self.mlp_bias = mlp_bias
        self.sliding_window = sliding_window
        # transformers' caches must keep every token: the model masks the window itself.
        self.layer_types = ["full_attention"] * num_hidden_layers
        self.use_cache = use_cache
        if routing_layers is None:
            routing_layers = range(num_hidden_layers // 2, num_hidden_layers)
        self.routing_layers = sorted(int(i) for i in routing_layers)
        self.router_reduction_factor = router_reduction_factor
        self.adapter_reduction_factor = adapter_reduction_factor
        self.router_order = router_order
        self.router_bias = router_bias
        self.gate = gate
        if isinstance(router_thresholds, (int, float)):
            router_thresholds = [float(router_thresholds)] * len(self.routing_layers)
        self.router_thresholds = [float(t) for t in router_thresholds]
        self._check_base()
        self._check_routing()

    @property
    def router_dim(self) -> int:
        """Width d_r of the router."""
        return int(self.hidden_size // self.router_reduction_factor)

    @property
    def adapter_dim(self) -> int:
        """Width of the adapter."""
        return int(self.intermediate_size // self.adapter_reduction_factor)

    @property
    def num_routed_layers(self) -> int:
        """Layers with a router."""
        return len(self.routing_layers)

    def _check_base(self) -> None:
        _one_of("base_model_type", self.base_model_type, BASE_MODEL_TYPES, UnsupportedError)
        if self.hidden_act not in ("silu", "swish"):
            raise UnsupportedError(
                f"config: hidden_act is {self.hidden_act!r}; only SwiGLU feed-forwards (silu) are implemented"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueOutOfRangeError(
                f"config: {self.num_attention_heads} attention heads over {self.num_key_value_heads} KV heads; "
                "the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ValueOutOfRangeError(
                f"config: head_dim is {self.head_dim}; rotary embedding needs an even one"
            )
        kind = self.rope_parameters["rope_type"]
        if kind not in _ROPE_KEYS:
            raise UnsupportedError(
                f"config: rope type {kind!r} is not implemented; {', '.join(_ROPE_KEYS)} are"
            )
        missing = [key for key in _ROPE_KEYS[kind] if key not in self.rope_parameters]
        if missing:
            raise ValueOutOfRangeError(f"config: rope type {kind!r} lacks {', '.join(missing)}")

    def _check_routing(self) -> None:
        layers = self.routing_layers
        wrong = [i for i in layers if not 0 <= i < self.num_hidden_layers]
        if wrong or len(set(layers)) != len(layers):
            raise ValueOutOfRangeError(
                f"config: routing_layers {layers}; wanted different layers of 0..{self.num_hidden_layers - 1}"
            )
        for name, factor, width in (
            ("router_reduction_factor", self.router_reduction_factor, self.hidden_size),
            ("adapter_reduction_factor", self.adapter_reduction_factor, self.intermediate_size),
        ):
            if factor < 1 or width // factor < 1:
                raise ValueOutOfRangeError(f"config: {name} is {factor}; wanted 1 to {width}")
        _one_of("router_order", self.router_order, ROUTER_ORDERS, ValueOutOfRangeError)
        _one_of("gate", self.gate, GATES, ValueOutOfRangeError)
        check_thresholds(self.router_thresholds, len(layers))

    @classmethod
    def from_base(cls, base: PretrainedConfig, **routing: Any) -> FlexiDepthConfig:
        """Configuration with the sizes of a transformers Llama, Qwen2 or Mistral configuration.

        Args:
            base: the base model's configuration, of transformers 4.57 or 5.
            routing: the routing arguments of this class.

        Raises:
            UnsupportedError: another architecture, activation, rope type or layer pattern.
        """
        kind = str(base.model_type)
        if kind not in BASE_MODEL_TYPES:
            raise UnsupportedError(
                f"config: base architecture {kind!r} is not implemented; {', '.join(BASE_MODEL_TYPES)} are. Its "
                "layer must be RMSNorm, rotary attention and SwiGLU, as theirs"
            )
        return cls(
            base_model_type=kind,
            vocab_size=base.vocab_size,
            hidden_size=base.hidden_size,
            intermediate_size=base.intermediate_size,
            num_hidden_layers=base.num_hidden_layers,
            num_attention_heads=base.num_attention_heads,
            num_key_value_heads=base.num_key_value_heads,
            head_dim=getattr(base, "head_dim", None),
            hidden_act=base.hidden_act,
            max_position_embeddings=base.max_position_embeddings,
            initializer_range=base.initializer_range,
            rms_norm_eps=base.rms_norm_eps,
            rope_parameters=_rope_of(base),
            attention_bias=bool(getattr(base, "attention_bias", False)),
            qkv_bias=kind == "qwen2",
            mlp_bias=bool(getattr(base, "mlp_bias", False)),
            sliding_window=_sliding_window_of(base),
            tie_word_embeddings=bool(base.tie_word_embeddings),
            bos_token_id=base.bos_token_id,
            eos_token_id=base.eos_token_id,
            pad_token_id=base.pad_token_id,
            **routing,
        )


def check_thresholds(thresholds: Sequence[float], num_routed: int) -> None:
    """Raise ValueOutOfRangeError unless there is one threshold in [0, 1] for each routed layer."""
    if len(thresholds) != num_routed:
        raise ValueOutOfRangeError(
            f"thresholds: {len(thresholds)} values; this model routes {num_routed} layers, "
            f"give one value or {num_routed}"
        )
    for i, tau in enumerate(thresholds):
        if not (math.isfinite(tau) and 0.0 <= tau <= 1.0):
            raise ValueOutOfRangeError(
                f"thresholds: value {i} is {tau}; a threshold lies in [0, 1]"
            )


def _one_of(name: str, value: object, allowed: tuple[str, ...], error: type[Exception]) -> None:
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise error(f"config: {name} is {value!r}; wanted one of {', '.join(allowed)}{hint}")


def _rope_of(base: PretrainedConfig) -> dict[str, Any]:
    """rope_parameters from transformers 5's field of that name or from 4's rope_theta and rope_scaling."""
    parameters = dict(getattr(base, "rope_parameters", None) or {})
    if not parameters:
        parameters = {
            "rope_theta": getattr(base, "rope_theta", 10000.0),
            **(getattr(base, "rope_scaling", None) or {}),
        }
    if "type" in parameters:
        parameters["rope_type"] = parameters.pop("type")
    if float(parameters.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError("config: partial rotary embedding is not implemented")
    return parameters


def _sliding_window_of(base: PretrainedConfig) -> int | None:
    window = getattr(base, "sliding_window", None)
    if window is None or not getattr(base, "use_sliding_window", True):
        return None
    kinds = set(getattr(base, "layer_types", None) or ())
    if len(kinds) > 1:
        raise UnsupportedError(
            "config: sliding-window attention in some layers only is not implemented"
        )
    return int(window)
