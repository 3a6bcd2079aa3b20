"""Dense decoding that others published, at batch 1 and short context, beside the model: what it is worth where
nothing of ours was measured yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .costs import dense_bytes
from .devices import A100, H100, Device
from .model import Machine, dense_seconds
from .precision import BF16, Precision
from .shapes import shape_config

_INT8 = Precision("int8, a scale a row", 8, 8)
_INT4 = Precision("int4, a scale and a zero for 32", 5, 5)
_GPT_FAST = "gpt-fast's README at 258ae2e, power limited to 330 W"
_NO_BUBBLES = "Hazy Research, Look Ma, No Bubbles (2025), from its share of the bandwidth"


@dataclass(frozen=True)
class Published:
    """A figure of somebody else."""

    device: Device
    model: str
    precision: Precision
    tokens_per_second: float
    source: str

    def compare(self) -> dict[str, Any]:
        """Beside the model's tokens per second; error: of the predicted time."""
        config = shape_config(self.model)
        predicted = dense_seconds(Machine.of(self.device), config, self.precision)
        return {
            "device": self.device.name,
            "model": self.model,
            "precision": self.precision.name,
            "tokens_per_second": self.tokens_per_second,
            "predicted": 1 / predicted,
            "error": predicted * self.tokens_per_second - 1,
            "source": self.source,
        }


def _of_share(device: Device, model: str, precision: Precision, share: float) -> float:
    """Tokens per second where bytes over time are so much of the published bandwidth."""
    return share * device.bandwidth * 1e9 / dense_bytes(shape_config(model), precision)


PUBLISHED = (
    Published(A100, "llama-2-7b", BF16, 104.9, _GPT_FAST),
    Published(A100, "llama-2-7b", _INT8, 155.58, _GPT_FAST),
    Published(A100, "llama-2-7b", _INT4, 196.80, _GPT_FAST),
    Published(A100, "llama-3-8b", BF16, 93.89, _GPT_FAST),
    Published(A100, "llama-3-8b", _INT8, 137.64, _GPT_FAST),
    Published(A100, "llama-3-70b", _INT8, 18.04, _GPT_FAST),
    Published(H100, "llama-3.2-1b", BF16, _of_share(H100, "llama-3.2-1b", BF16, 0.78), _NO_BUBBLES),
)
