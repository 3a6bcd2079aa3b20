"""Which of its forms a decoding pass takes: a kernel for each phase, the same with kernels that overlap, or one
persistent kernel for all.

All give the same bits (csrc/ops/persistent.h, csrc/cuda/context.h). Which is fastest depends on the model, the context
and the device, so it is measured where it is open; and a form that gives other bits on a device is not taken there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import UnsupportedError, ValueOutOfRangeError

if TYPE_CHECKING:
    from .cuda_runtime import Graph, Runtime

# Bytes of the largest layer's weights up to which a persistent pass is tried. Launching a kernel for a phase costs two
# to three microseconds. A layer of 128 MB has five phases of 26 MB, which take ten at 2.5 TB/s: beyond, launches are
# under a quarter of a pass, part of which the persistent kernel pays for its barriers.
MOST_LAYER_BYTES = 128_000_000
OVERLAP_VARIABLE = "FLEXIDEPTH_CUDA_OVERLAP"
PERSISTENT_VARIABLE = "FLEXIDEPTH_CUDA_PERSISTENT"


class PassForm(Enum):
    """How a decoding pass is launched."""

    KERNELS = "kernels"  # one for each phase
    OVERLAP = "overlap"  # the same; each begins while the one ahead of it ends
    PERSISTENT = "persistent"  # one for all phases


@dataclass(frozen=True)
class PassChoice:
    """What was measured for so many sequences, pages of context and a way to route.

    seconds: of a pass, by form. said: of a form that is not to be had here, why.
    """

    sequences: int
    pages: int
    routing: str
    seconds: dict[str, float]
    said: dict[str, str] = field(default_factory=dict)

    @property
    def chosen(self) -> PassForm:
        """The fastest; of equal ones the plainer."""
        return min(
            (form for form in PassForm if form.value in self.seconds),
            key=lambda form: self.seconds[form.value],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "chosen": self.chosen.value}


def asked_for(variable: str, wanted: bool | None) -> bool | None:
    """The caller's word, or the environment's; None = as measured."""
    if wanted is not None:
        return wanted
    text = os.environ.get(variable, "")
    if text not in ("", "0", "1"):
        raise ValueOutOfRangeError(
            f"engine: {variable} is {text!r}; wanted 0 or 1, or nothing to choose by measurement"
        )
    return None if not text else text == "1"


def blocks_may_wait() -> bool:
    """Whether kernels whose blocks wait for each other may run at all, draws among them: the environment can say no,
    where a device is suspected to have them wait for ever."""
    return asked_for(PERSISTENT_VARIABLE, None) is not False


def open_forms(
    overlap: bool | None, persistent: bool | None, *, can_overlap: bool, strict_router: bool
) -> list[PassForm]:
    """Forms to choose from, the plainer ones first.

    overlap, persistent: what the caller wants, before the environment is asked.

    Raises:
        UnsupportedError: a persistent pass with a strict router.
    """
    overlap = asked_for(OVERLAP_VARIABLE, overlap)
    persistent = asked_for(PERSISTENT_VARIABLE, persistent)
    if persistent and strict_router:
        raise UnsupportedError(
            "engine: a persistent pass takes a folded router; leave strict_router or persistent out"
        )
    if persistent:
        return [PassForm.PERSISTENT]
    forms = [PassForm.KERNELS]
    if can_overlap and overlap is not False:
        forms = [PassForm.OVERLAP] if overlap else [*forms, PassForm.OVERLAP]
    return forms if persistent is False or strict_router else [*forms, PassForm.PERSISTENT]


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
    forms: Sequence[PassForm],
    launch: Callable[[PassForm], None],
    results: Callable[[], Sequence[Tensor]],
    sequences: int,
    pages: int,
    routing: str,
) -> PassChoice:
    """Time a pass in each form.

    Args:
        launch: queues one; it may be repeated without changing anything.
        results: what the last one left, copied.

    Raises:
        Whatever keeps the first, the plainest form from running; what keeps another one from it is in `said`.
    """
    seconds: dict[str, float] = {}
    said: dict[str, str] = {}
    plain: Sequence[Tensor] | None = None
    for form in forms:
        try:
            graph: Graph = runtime.capture(lambda form=form: launch(form))  # type: ignore[misc]
            took = runtime.seconds_of(graph)
        except (RuntimeError, MemoryError) as error:
            if plain is None:
                raise
            said[form.value] = str(error)
            continue
        found = results()
        if plain is None:
            plain = found
        if all(_same(one, other) for one, other in zip(found, plain, strict=True)):
            seconds[form.value] = took
        else:
            said[form.value] = f"gives other results than {forms[0].value} on this device"
    return PassChoice(sequences, pages, routing, seconds, said)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, NaN included."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
