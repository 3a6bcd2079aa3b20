"""Which of its two forms a decoding pass takes: a kernel for each phase, or one persistent kernel for all.

Both give the same bits (csrc/ops/persistent.h). Which is faster depends on the model, the context and the device, so it
is measured where it is open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError, ValueOutOfRangeError

if TYPE_CHECKING:
    from .cuda_runtime import Graph, Runtime

# Bytes of the largest layer's weights up to which a persistent pass is tried. Launching a kernel for a phase costs two
# to three microseconds. A layer of 128 MB has five phases of 26 MB, which take ten at 2.5 TB/s: beyond, launches are
# under a quarter of a pass, part of which the persistent kernel pays for its barriers.
MOST_LAYER_BYTES = 128_000_000
_VARIABLE = "FLEXIDEPTH_CUDA_PERSISTENT"


@dataclass(frozen=True)
class PassChoice:
    """What was measured for so many sequences, pages of context and a way to route.

    kernels, persistent: seconds of a pass in each form; persistent is None where the device refuses it, and `said`
    tells why.
    """

    sequences: int
    pages: int
    routing: str
    kernels: float
    persistent: float | None
    said: str = ""

    @property
    def chose_persistent(self) -> bool:
        """Whether the persistent form is used."""
        return self.persistent is not None and self.persistent < self.kernels

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "chose_persistent": self.chose_persistent}


def forced_form(strict_router: bool, wanted: bool | None) -> bool | None:
    """True = always persistent, False = never, None = as measured. wanted: the caller's; None = the environment's."""
    if wanted is None:
        text = os.environ.get(_VARIABLE, "")
        if text not in ("", "0", "1"):
            raise ValueOutOfRangeError(
                f"engine: {_VARIABLE} is {text!r}; wanted 0 or 1, or nothing to choose by measurement"
            )
        wanted = None if not text else text == "1"
    if wanted and strict_router:
        raise UnsupportedError(
            "engine: a persistent pass takes a folded router; leave strict_router or persistent out"
        )
    return False if strict_router else wanted


def may_pay(nbytes: Mapping[str, int]) -> bool:
    """Whether a model is so small that phases are short beside what launching them costs.

    nbytes: of each weight, by its canonical name.
    """
    layers: dict[str, int] = {}
    for name, count in nbytes.items():
        if name.startswith("model.layers."):
            layer = name.split(".")[2]
            layers[layer] = layers.get(layer, 0) + count
    return max(layers.values()) <= MOST_LAYER_BYTES


def measure(
    runtime: Runtime,
    launch: Callable[[bool], None],
    sequences: int,
    pages: int,
    routing: str,
) -> PassChoice:
    """Time a pass in both forms; launch(persistent) queues one, and may be repeated without changing anything."""

    def seconds(persistent: bool) -> float:
        graph: Graph = runtime.capture(lambda: launch(persistent))
        return runtime.seconds_of(graph)

    kernels = seconds(False)
    try:
        return PassChoice(sequences, pages, routing, kernels, seconds(True))
    except UnsupportedError as error:
        return PassChoice(sequences, pages, routing, kernels, None, str(error))
