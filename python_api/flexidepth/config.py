"""Configuration of a FlexiDepth model: a Llama-family base plus routing of its later layers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from .dial import check_dial, check_thresholds
from .errors import UnsupportedError, ValueOutOfRangeError
from .rope_parameters import complete_rope_parameters, rope_parameters_of

ROUTER_ORDERS = ("norm_tanh", "tanh_norm")
GATES = ("multiplier", "straight_through")
ABLATIONS = (
    "linear_router",
    "no_adapter",
    "no_skipped_kv",
    "attention_only",
    "feed_forward_only",
    "no_skipped_kv_but_first",
)
_EXCLUSIVE = (
    {"attention_only", "feed_forward_only"},
    {"no_skipped_kv", "no_skipped_kv_but_first"},
)
BASE_MODEL_TYPES = ("llama", "qwen2", "mistral")
_ROUTING_FIELDS = (
    "routing_layers",
    "router_reduction_factor",
    "adapter_reduction_factor",
    "router_order",
    "router_bias",
    "gate",
    "router_thresholds",
    "ablations",
)
_DIAL_FIELDS = ("calibration", "skip_presets")
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


class FlexiDepthConfig(PretrainedConfig):  # type: ignore[misc]
    """Sizes of the base model and how its layers are routed.

    Args:
        base_model_type: "llama", "qwen2" or "mistral".
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
        num_key_value_heads, head_dim, max_position_embeddings, rms_norm_eps, tie_word_embeddings:
            as in transformers' configuration of the base model.
        rope_parameters: {"rope_theta": ..., "rope_type": "default" | "llama3" | "linear", ...}, as in
            transformers 5; or rope_theta and rope_scaling, as in transformers 4.
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
        ablations: what is taken away, see flexidepth.ablations: "linear_router", "no_adapter", "no_skipped_kv"
            (keys and values of skipped tokens) or "no_skipped_kv_but_first" (but for a text's first token),
            "attention_only" or "feed_forward_only" (what is skipped).
        calibration: points {"layers_skipped": mean a token, "thresholds": [tau per routed layer]}, as
            `flexidepth calibrate` measures them; skip_presets: {name: layers skipped} (flexidepth.dial).

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
        ablations: Sequence[str] = (),
        calibration: list[dict[str, Any]] | None = None,
        skip_presets: Mapping[str, float] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("layer_types", None)
        theta, scaling = kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None)
        _refuse_misspelt(kwargs)
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
        _whole_number("hidden_size", hidden_size, 1)
        _whole_number("num_attention_heads", num_attention_heads, 1)
        self.num_key_value_heads = (
            num_attention_heads if num_key_value_heads is None else num_key_value_heads
        )
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = complete_rope_parameters(rope_parameters, theta, scaling)
        self.attention_bias = attention_bias
        self.qkv_bias = qkv_bias
        self.mlp_bias = mlp_bias
        self.sliding_window = sliding_window
        # transformers' caches must keep every token: the model masks the window itself.
        self.layer_types = ["full_attention"] * num_hidden_layers
        self.use_cache = use_cache
        if routing_layers is None:
            routing_layers = range(num_hidden_layers // 2, num_hidden_layers)
        self.routing_layers = _layer_numbers(routing_layers)
        self.router_reduction_factor = router_reduction_factor
        self.adapter_reduction_factor = adapter_reduction_factor
        self.router_order = router_order
        self.router_bias = router_bias
        self.gate = gate
        self.router_thresholds: list[float] = router_thresholds  # type: ignore[assignment]
        self.ablations = list(ablations)
        self.calibration = [] if calibration is None else calibration
        self.skip_presets = {} if skip_presets is None else skip_presets
        self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        # Also when it is changed later, as by from_pretrained(..., router_thresholds=0.7): one for all.
        if name == "router_thresholds":
            one = isinstance(value, (int, float))
            value = [value] * len(self.routing_layers) if one else list(value)
        super().__setattr__(name, value)

    def check(self) -> None:
        """Raise unless all fields fit together; called again when a model is made of them.

        Raises:
            ValueOutOfRangeError: a value outside its range. UnsupportedError: a variant not implemented.
        """
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

    def rope_inv_freq(self) -> list[float]:
        """Rotary frequencies [head_dim / 2], scaling applied (reference.rope_inv_freq)."""
        from .reference import rope_inv_freq

        frequencies: list[float] = rope_inv_freq(self.head_dim, self.rope_parameters).tolist()
        return frequencies

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies, as transformers 4 names it."""
        return float(self.rope_parameters["rope_theta"])

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = complete_rope_parameters(
            {**self.rope_parameters, "rope_theta": value}
        )

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """Scaling of the rotary frequencies, None where there is none, as transformers 4 names it."""
        rest = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        return None if rest["rope_type"] == "default" else rest

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        self.rope_parameters = complete_rope_parameters(None, self.rope_theta, value)

    def _check_base(self) -> None:
        for name in _COUNTS:
            _whole_number(name, getattr(self, name), 1)
        if self.sliding_window is not None:
            _whole_number("sliding_window", self.sliding_window, 1)
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            raise ValueOutOfRangeError(
                f"config: rms_norm_eps is {self.rms_norm_eps}; wanted a number from 0 on"
            )
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
        complete_rope_parameters(self.rope_parameters)

    def _check_routing(self) -> None:
        layers = _layer_numbers(self.routing_layers)
        wrong = [i for i in layers if not 0 <= i < self.num_hidden_layers]
        if wrong or len(set(layers)) != len(layers):
            raise ValueOutOfRangeError(
                f"config: routing_layers {layers}; wanted different layers of 0..{self.num_hidden_layers - 1}"
            )
        for name, factor, width in (
            ("router_reduction_factor", self.router_reduction_factor, self.hidden_size),
            ("adapter_reduction_factor", self.adapter_reduction_factor, self.intermediate_size),
        ):
            whole = isinstance(factor, int) and not isinstance(factor, bool)
            if not whole or not 1 <= factor <= width:
                raise ValueOutOfRangeError(
                    f"config: {name} is {factor!r}; wanted 1 to {width}, so that a width of at least 1 is left"
                )
        _one_of("router_order", self.router_order, ROUTER_ORDERS, ValueOutOfRangeError)
        _one_of("gate", self.gate, GATES, ValueOutOfRangeError)
        for name in self.ablations:
            _one_of("ablations' entry", name, ABLATIONS, ValueOutOfRangeError)
        for pair in _EXCLUSIVE:
            if pair <= set(self.ablations):
                raise ValueOutOfRangeError(
                    f"config: ablations are {self.ablations}; {' and '.join(sorted(pair))} exclude each other"
                )
        check_thresholds(self.router_thresholds, len(layers), layers)
        check_dial(self.calibration, self.skip_presets, layers)

    @classmethod
    def from_base(cls, base: PretrainedConfig, **routing: Any) -> FlexiDepthConfig:
        """Configuration with the sizes of a transformers Llama, Qwen2 or Mistral configuration.

        Args:
            base: the base model's configuration, of transformers 4.57 or 5.
            routing: the routing arguments of this class.

        Raises:
            UnsupportedError: another architecture, activation, rope type or layer pattern.
            ValueOutOfRangeError: a routing argument of another name, or outside its range.
        """
        for name in routing:
            if name not in _ROUTING_FIELDS:
                raise ValueOutOfRangeError(
                    f"config: no routing argument {name!r}; there are {', '.join(_ROUTING_FIELDS)}"
                    f"{_hint(name, _ROUTING_FIELDS)}"
                )
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
            rope_parameters=rope_parameters_of(base),
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


def keeps_skipped_kv(ablations: Collection[str]) -> bool:
    """Whether a model with these ablations has keys and values of every token that skips a layer."""
    return not {"no_skipped_kv", "no_skipped_kv_but_first"} & set(ablations)


def has_adapter(ablations: Collection[str]) -> bool:
    """Whether skipped tokens have an adapter: not without one, nor where the feed-forward always runs."""
    return not {"no_adapter", "attention_only"} & set(ablations)


def _hint(word: object, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(word), allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _one_of(name: str, value: object, allowed: tuple[str, ...], error: type[Exception]) -> None:
    if value not in allowed:
        raise error(
            f"config: {name} is {value!r}; wanted one of {', '.join(allowed)}{_hint(value, allowed)}"
        )


def _whole_number(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueOutOfRangeError(
            f"config: {name} is {value!r}; wanted a whole number from {least} on"
        )


def _layer_numbers(layers: Sequence[int]) -> list[int]:
    """Ascending layer numbers; no other type is made one, 1.7 would silently become layer 1."""
    numbers = list(layers)
    for number in numbers:
        _whole_number("routing_layers' entry", number, 0)
    return sorted(numbers)


def _refuse_misspelt(extra: dict[str, Any]) -> None:
    """transformers keeps any unknown key as an attribute, so a misspelt one would do nothing at all."""
    fields = (*_ROUTING_FIELDS, *_DIAL_FIELDS)
    for name in extra:
        if close := difflib.get_close_matches(name, fields, n=1, cutoff=0.85):
            raise ValueOutOfRangeError(f"config: no field {name!r}; did you mean {close[0]!r}?")


def _sliding_window_of(base: PretrainedConfig) -> int | None:
    window = getattr(base, "sliding_window", None)
    if window is None or not getattr(base, "use_sliding_window", True):
        return None
    kinds = set(getattr(base, "layer_types", None) or ())
    if kinds == {"full_attention"}:  # Qwen2 with a window from a layer on that it does not have
        return None
    if len(kinds) > 1:
        raise UnsupportedError(
            "config: sliding-window attention in some layers only is not implemented"
        )
    return int(window)
