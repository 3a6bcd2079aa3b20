"""Forcing a routing, and reporting the routing that happened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .config import FlexiDepthConfig
from .errors import CheckpointError, ShapeError, ValueOutOfRangeError
from .routing_mask import recorded_mask

RoutingMode = Literal["router", "forced", "forced_hard", "dense"]
Mask: TypeAlias = Tensor | npt.NDArray[Any] | Sequence[Sequence[bool] | Sequence[int]]
ForceRouting: TypeAlias = "str | float | Sequence[int] | Mask | RoutingReport | None"

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WANTED = "'all', 'none', 'dense', a list of layers, a ratio, a mask or a RoutingReport"
# By the mode of a report, the one that computes the same from its decisions: a router's are weighed by its gates.
_REPLAY: dict[str, RoutingMode] = {
    "router": "forced",
    "forced": "forced",
    "forced_hard": "forced_hard",
    "dense": "dense",
}
_MASK64 = (1 << 64) - 1


def skip_ratio_mask(num_skipped: int, seed: int, start: int, stop: int, num_routed: int) -> Tensor:
    """Random masks with an exact count: uint8 [stop - start, num_routed], 0 for `num_skipped` layers a token.

    Row i belongs to absolute position start + i and depends on (seed, position) alone, so that chunks and
    batches never change it. The layers with the smallest hashes (splitmix64) are skipped.
    """
    counters = np.arange(start * num_routed, stop * num_routed, dtype=np.uint64)
    hashes = _splitmix64(np.uint64(seed & _MASK64) ^ _splitmix64(counters))
    order = hashes.reshape(stop - start, num_routed).argsort(axis=1, kind="stable")
    mask = np.ones((stop - start, num_routed), dtype=np.uint8)
    np.put_along_axis(mask, order[:, :num_skipped], 0, axis=1)
    return torch.from_numpy(mask)


def _splitmix64(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The mixer of splitmix64 on arrays, in which 64-bit products wrap around without a warning."""
    value = value + _INCREMENT
    value = (value ^ (value >> np.uint64(30))) * _MIX_A
    value = (value ^ (value >> np.uint64(27))) * _MIX_B
    return value ^ (value >> np.uint64(31))


@dataclass(frozen=True)
class ForcedRouting:
    """A resolved `force_routing`: how the engine routes, and the mask of any range of positions.

    mode: "router" (the model decides), "forced" (mask decides, the model's gates weigh), "forced_hard"
    (mask decides, weights 1), "dense" (everything runs, routers not evaluated). key: equal for routings
    that compute the same cache contents.
    """

    mode: RoutingMode
    num_routed: int
    key: str
    fixed: Tensor | None = None  # uint8 [num_routed], the same for every token
    recorded: Tensor | None = None  # uint8 [tokens, num_routed], by absolute position
    num_skipped: int = 0
    seed: int = 0

    def rows(self, start: int, stop: int) -> Tensor | None:
        """Mask uint8 [stop - start, num_routed], 1 = run; None when the mode needs none."""
        if self.mode in ("router", "dense"):
            return None
        if self.fixed is not None:
            return self.fixed.expand(stop - start, -1).contiguous()
        if self.recorded is not None:
            if stop > len(self.recorded):
                raise ShapeError(
                    f"force_routing: the mask covers {len(self.recorded)} tokens, position {stop - 1} is needed; "
                    "give one row per prompt and generated token or lower max_new_tokens"
                )
            return self.recorded[start:stop].contiguous()
        return skip_ratio_mask(self.num_skipped, self.seed, start, stop, self.num_routed)


def resolve_force_routing(
    force: ForceRouting, config: FlexiDepthConfig, seed: int = 0
) -> ForcedRouting:
    """Turn a `force_routing` argument into a ForcedRouting.

    Args:
        force: None = the router decides; "all" = every layer runs with gate weight 1 (the base model
            exactly); "none" = every routed layer is skipped, adapters at weight 1; "dense" = as "all", routers
            not evaluated; a list of layers = these routed layers run, the others skip; a float = share of the
            routed layers that each token skips, an exact count drawn by (seed, position); a mask [tokens,
            routed layers] of booleans or of integers 0 and 1 (torch tensor, numpy array, list of rows) =
            decisions by absolute position, True = run, weighed by the model's own gates; a RoutingReport =
            its decisions, weighed as in the run that it reports.
        seed: of the draw for a float.

    Raises:
        ValueOutOfRangeError: an unknown word, a layer that is not routed, a ratio outside [0, 1], a mask that
            holds something else than 0 and 1, a report that does not begin at position 0.
        ShapeError: a mask with the wrong number of layers, a report of another model.
        DtypeError: a mask of neither booleans nor integers.
    """
    num = config.num_routed_layers
    if force is None:
        return ForcedRouting("router", num, "router")
    if isinstance(force, str):
        return _by_word(force, num)
    if isinstance(force, RoutingReport):
        return _by_report(force, config)
    if isinstance(force, (Tensor, np.ndarray)):
        return _by_mask(force, "forced", num)
    if isinstance(force, Real) and not isinstance(force, bool):
        return _by_ratio(float(force), num, seed)
    if not isinstance(force, Sequence):
        raise ValueOutOfRangeError(
            f"force_routing: {type(force).__name__} {force!r}; wanted {_WANTED}"
        )
    if len(force) and isinstance(force[0], (Sequence, Tensor, np.ndarray)):
        return _by_mask(force, "forced", num)
    return _by_layers(force, config)


def _by_word(word: str, num_routed: int) -> ForcedRouting:
    if word == "dense":
        return ForcedRouting("dense", num_routed, "all")
    if word not in ("all", "none"):
        raise ValueOutOfRangeError(f"force_routing: {word!r}; wanted {_WANTED}")
    fixed = torch.full((num_routed,), int(word == "all"), dtype=torch.uint8)
    return ForcedRouting("forced_hard", num_routed, word, fixed)


def _by_ratio(ratio: float, num_routed: int, seed: int) -> ForcedRouting:
    if not 0 <= ratio <= 1:
        raise ValueOutOfRangeError(f"force_routing: skip ratio is {ratio}; it lies in [0, 1]")
    skipped = round(ratio * num_routed)
    return ForcedRouting(
        "forced_hard", num_routed, f"skip{skipped}/{seed}", num_skipped=skipped, seed=seed
    )


def _by_layers(force: Sequence[Any], config: FlexiDepthConfig) -> ForcedRouting:
    layers = config.routing_layers
    for layer in force:
        if not isinstance(layer, Integral) or isinstance(layer, bool):
            raise ValueOutOfRangeError(
                f"force_routing: {layer!r} in a list of layers; wanted layer numbers, or rows of True and "
                "False, one per token"
            )
    if wrong := sorted({int(layer) for layer in force} - set(layers)):
        raise ValueOutOfRangeError(
            f"force_routing: layers {wrong} are not routed; this model routes {layers}"
        )
    fixed = torch.tensor([int(layer in force) for layer in layers], dtype=torch.uint8)
    return ForcedRouting("forced_hard", len(layers), f"layers{fixed.tolist()}", fixed)


def _by_mask(mask: Any, mode: RoutingMode, num_routed: int) -> ForcedRouting:
    recorded = recorded_mask(mask, num_routed)
    digest = hashlib.blake2b(recorded.numpy().tobytes(), digest_size=16).hexdigest()
    # The mode too: the same decisions weighed in another way fill the cache with other values.
    return ForcedRouting(mode, num_routed, f"{mode}/{digest}", recorded=recorded)


def _by_report(report: RoutingReport, config: FlexiDepthConfig) -> ForcedRouting:
    """The report's decisions, weighed as they were: by the gates, or by 1 where they had been forced."""
    made, own = (
        (report.num_layers, report.routing_layers),
        (config.num_hidden_layers, list(config.routing_layers)),
    )
    if made != own:
        raise ShapeError(
            f"force_routing: the report routes layers {made[1]} of {made[0]}, this model {own[1]} of {own[0]}; "
            "replay it with the model that it was made with"
        )
    if report.mode not in _REPLAY:
        raise ValueOutOfRangeError(
            f"force_routing: the report's mode is {report.mode!r}; wanted one of {', '.join(_REPLAY)}"
        )
    mode = _REPLAY[report.mode]
    if mode == "dense":
        return _by_word("dense", config.num_routed_layers)
    return _by_mask(report.mask(), mode, config.num_routed_layers)


@dataclass(frozen=True)
class RoutingReport:
    """What the router did, token by token (prompt tokens first).

    tokens: text of each token. ran: uint8 [tokens, routed layers], 1 = run. gates: float32 of that shape, NaN
    where routers were not evaluated. prompt_length: how many of the rows belong to the prompt. mode: how
    routing was decided (see ForcedRouting). first_position: absolute position of the first row, above 0 where
    a prompt cache held the tokens before it.

    Given as `force_routing` it replays the run it reports; see `resolve_force_routing`.
    """

    tokens: list[str]
    ran: Tensor
    gates: Tensor
    routing_layers: list[int]
    num_layers: int
    prompt_length: int
    mode: str
    first_position: int = 0

    @property
    def layers_used(self) -> list[int]:
        """Layers each token ran, the unrouted ones included."""
        always = self.num_layers - len(self.routing_layers)
        return [always + int(n) for n in self.ran.sum(1)]

    @property
    def mean_layers_used(self) -> float:
        """Mean over the generated tokens' passes (over the prompt where nothing was generated)."""
        used = self.layers_used[self.prompt_length :] or self.layers_used
        return sum(used) / len(used) if used else float("nan")

    @property
    def skip_rate(self) -> dict[int, float]:
        """Share of tokens that skipped, by layer."""
        if not len(self.ran):
            return dict.fromkeys(self.routing_layers, 0.0)
        rates = 1 - self.ran.float().mean(0)
        return dict(zip(self.routing_layers, rates.tolist(), strict=True))

    def mask(self) -> Tensor:
        """The decisions by absolute position, uint8 [tokens, routed layers], for `force_routing`.

        ValueOutOfRangeError where the report does not begin at position 0: what ran there is not known, and
        any guess would change what the later tokens see.
        """
        if self.first_position:
            raise ValueOutOfRangeError(
                f"force_routing: the report begins at position {self.first_position}, behind the tokens that a prompt "
                "cache held; wanted one from position 0; make it without a cache, or put the rows of the reports "
                f"before it on top: torch.cat([earlier.ran[:{self.first_position}], report.ran])"
            )
        return self.ran.clone()

    def to_json(self) -> str:
        """A JSON text that `from_json` reads."""
        gates = [[None if g != g else round(g, 6) for g in row] for row in self.gates.tolist()]
        return json.dumps(
            {
                "format": "flexidepth-routing-1",
                "mode": self.mode,
                "num_layers": self.num_layers,
                "routing_layers": self.routing_layers,
                "prompt_length": self.prompt_length,
                "first_position": self.first_position,
                "tokens": self.tokens,
                "ran": self.ran.tolist(),
                "gates": gates,
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> RoutingReport:
        """Read what `to_json` wrote; CheckpointError for anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != "flexidepth-routing-1":
                raise KeyError("format")
            shape = (len(data["tokens"]), len(data["routing_layers"]))
            gates = [[float("nan") if g is None else g for g in row] for row in data["gates"]]
            return cls(
                list(data["tokens"]),
                torch.tensor(data["ran"], dtype=torch.uint8).reshape(shape),
                torch.tensor(gates, dtype=torch.float32).reshape(shape),
                list(data["routing_layers"]),
                int(data["num_layers"]),
                int(data["prompt_length"]),
                str(data["mode"]),
                int(data.get("first_position", 0)),
            )
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"not a routing report (write one with --routing-out): {error!r}"
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> RoutingReport:
        """Read a report from a file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))
