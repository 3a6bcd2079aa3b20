"""Recorded decisions in a small file: a hexadecimal number a token, one bit a routed layer, 1 = run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexidepth.errors import CheckpointError
from flexidepth.plain_json import json_text

FORMAT = "flexidepth-recorded-routing-2"
FILE = "routing.json"


@dataclass(frozen=True)
class RecordedSequence:
    """Decisions of one prompt and its answer: uint8 [tokens, routed layers], the prompt's first."""

    kind: str
    prompt_length: int
    ran: npt.NDArray[np.uint8]

    @property
    def decoded(self) -> npt.NDArray[np.uint8]:
        """Of the passes that made the answer."""
        return self.ran[self.prompt_length :]


@dataclass(frozen=True)
class Recording:
    """levels: {what the dial was set to: sequences}; the model and its sha256, how its layers are routed, what recorded
    them."""

    model: str
    sha256: str
    num_layers: int
    routing_layers: list[int]
    command: str
    levels: dict[str, list[RecordedSequence]]

    def save(self, path: Path) -> None:
        """Write the file."""
        routed = len(self.routing_layers)
        content = {
            "format": FORMAT,
            "model": self.model,
            "sha256": self.sha256,
            "num_layers": self.num_layers,
            "routing_layers": self.routing_layers,
            "command": self.command,
            "levels": {
                level: [
                    {
                        "kind": one.kind,
                        "prompt_length": one.prompt_length,
                        "ran": _packed(one.ran, routed),
                    }
                    for one in sequences
                ]
                for level, sequences in self.levels.items()
            },
        }
        path.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")


def read_recording(path: Path) -> Recording:
    """Read what `Recording.save` wrote; CheckpointError for anything else."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise KeyError("format")
        routed = len(content["routing_layers"])
        return Recording(
            content["model"],
            content["sha256"],
            content["num_layers"],
            content["routing_layers"],
            content["command"],
            {
                level: [
                    RecordedSequence(
                        one["kind"], one["prompt_length"], _unpacked(one["ran"], routed)
                    )
                    for one in sequences
                ]
                for level, sequences in content["levels"].items()
            },
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a recording of decisions (python -m flexidepth.bench.scaling.record makes one): {error!r}"
        ) from error


def _digits(routed: int) -> int:
    return -(-routed // 4)


def _packed(ran: npt.NDArray[np.uint8], routed: int) -> str:
    """The first routed layer is the highest bit of a token's number; numbers stand one behind the other."""
    numbers = (int("".join("1" if bit else "0" for bit in row), 2) for row in ran)
    return "".join(f"{number:0{_digits(routed)}x}" for number in numbers)


def _unpacked(text: str, routed: int) -> npt.NDArray[np.uint8]:
    digits = _digits(routed)
    if len(text) % digits:
        raise ValueError(f"{len(text)} digits; wanted a multiple of {digits}")
    rows = [int(text[i : i + digits], 16) for i in range(0, len(text), digits)]
    if any(number >> routed for number in rows):
        raise ValueError(f"more bits than {routed} routed layers")
    bits = [[number >> (routed - 1 - layer) & 1 for layer in range(routed)] for number in rows]
    return np.array(bits, dtype=np.uint8).reshape(len(rows), routed)
