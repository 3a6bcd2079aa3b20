"""How many bits a weight takes, scales of its group included."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = 32  # weights that share a scale, as in GGUF's Q8_0 and Q4_0
_SCALE_BITS = 16


@dataclass(frozen=True)
class Precision:
    """weight_bits and head_bits: of a weight of the layers and of the LM head, its share of a scale included.
    other_bits: of norms, keys and values. Routers are float32 in all of them."""

    name: str
    weight_bits: float
    head_bits: float
    other_bits: float = 16.0

    @property
    def weight_bytes(self) -> float:
        """Of one weight of a layer."""
        return self.weight_bits / 8

    @property
    def head_bytes(self) -> float:
        """Of one weight of the LM head."""
        return self.head_bits / 8

    @property
    def other_bytes(self) -> float:
        """Of one value of a norm or of the cache."""
        return self.other_bits / 8


def grouped(bits: int) -> float:
    """Bits of a weight of `bits` bits with a 16-bit scale for every group: 8.5 for 8, 4.5 for 4."""
    return bits + _SCALE_BITS / GROUP


FLOAT32 = Precision("float32", 32, 32, 32)
BF16 = Precision("bf16", 16, 16)
INT8 = Precision("int8", grouped(8), grouped(8))
INT4 = Precision("int4", grouped(4), grouped(4))
INT8_HEAD16 = Precision("int8, head bf16", grouped(8), 16)
INT4_HEAD16 = Precision("int4, head bf16", grouped(4), 16)
STUDIED = (BF16, INT8, INT8_HEAD16, INT4, INT4_HEAD16)
"""The precisions of the study."""
