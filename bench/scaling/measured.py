"""The newest committed measurement of every machine, and what the model says of it.

`bench.json` is what `flexidepth bench` writes, `gpu_check.json` what `bench.gpu_check --engine` writes. A file whose
model, type or form cannot be compared is a `Refused` with its reason, never left out in silence.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexidepth.config import FlexiDepthConfig
from flexidepth.errors import CheckpointError, FlexiDepthError

from ..ideal import flops_of_prompt, ideal_speedup
from ..models import NAMES, model_config
from ..results_file import FORMAT_1, FORMAT_2, bandwidth_of, rows_of
from ..rows import DECODE, BenchRow
from ..run import FORMAT
from .devices import (
    CPU_LATENCY,
    CPU_PHASES,
    CPU_SHARE,
    CUDA_LATENCY,
    CUDA_PHASES,
    ONE_THREAD,
)
from .model import Machine
from .points import Series
from .precision import BF16, FLOAT32
from .series import Row, Setting, decode_series, prompt_series
from .shapes import ADAPTER_FACTORS, SHAPES, shape_config

_PRECISIONS = {"bfloat16": BF16, "float32": FLOAT32}
_COPY_SHARE = 1.0  # reading reaches what a copy moves
_SAME_LINE = 1e-6  # of the ideal line, relative


@dataclass(frozen=True)
class Refused:
    """A file of measurements that is not compared, and why."""

    file: str
    why: str

    def to_dict(self) -> dict[str, str]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """What was found."""

    series: list[Series]
    refused: list[Refused]


def read_measured(results: Path) -> Measured:
    """All measurements in the folders directly under `results`."""
    readers: dict[str, Callable[[dict[str, Any], str], Iterator[Series]]] = {
        "bench.json": _of_bench,
        "gpu_check.json": _of_gpu_check,
    }
    found = Measured([], [])
    for name, reader in readers.items():
        for path in sorted(results.glob(f"*/{name}")):
            folder = path.parent.name
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                found.series.extend(list(reader(content, folder)))
            except FlexiDepthError as error:
                found.refused.append(Refused(f"{folder}/{name}", str(error)))
            except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
                why = f"not a file of measurements: {error!r}"
                found.refused.append(Refused(f"{folder}/{name}", why))
    return found


def _of_bench(content: dict[str, Any], folder: str) -> Iterator[Series]:
    """Decoding and prompts of one sequence on the CPU, each group of rows by itself; peers are not ours to predict."""
    if content["format"] not in (FORMAT, FORMAT_2, FORMAT_1):
        raise CheckpointError(f"its format is {content['format']!r}; wanted {FORMAT!r}")
    groups: dict[tuple[Any, ...], list[BenchRow]] = {}
    for row in rows_of(content):
        measured = row.ms_median is not None and row.device == "cpu" and row.batch == 1
        if measured and not row.peer:
            groups.setdefault(row.group, []).append(row)
    bandwidth = bandwidth_of(content)
    for rows in groups.values():
        first = rows[0]
        if first.dtype not in _PRECISIONS:
            raise CheckpointError(
                f"its type is {first.dtype!r}; wanted one of {', '.join(_PRECISIONS)}"
            )
        precision = _PRECISIONS[first.dtype]
        config = _measured_config(first.model, rows, round(precision.weight_bytes))
        threads = first.threads
        words = f"{threads} thread{'s' if threads != 1 else ''}"
        setting = Setting(folder, first.model, first.dtype, words)
        if first.kind == DECODE:
            latency = ONE_THREAD if threads == 1 else CPU_LATENCY
            machine = Machine(bandwidth[f"{threads} threads"], CPU_SHARE, CPU_PHASES, latency)
            steps = [_row(row, row.skip_got) for row in rows]
            context = _depth(first)
            yield decode_series(setting, steps, machine, config, precision, context=context)
        else:
            routed = config.num_routed_layers
            shares = [
                _row(row, None if row.skip_got is None else row.skip_got / routed) for row in rows
            ]
            yield prompt_series(setting, shares, config, int(first.test.removeprefix("pp")))


def _row(row: BenchRow, skipped: float | None) -> Row:
    return Row(row.name, skipped, (row.ms_median or 0.0) / 1e3, _spread(list(row.samples)))


def _depth(row: BenchRow) -> int:
    return int(row.test.split("@ d")[1])


def _spread(samples: list[float]) -> float | None:
    """Half the distance of the quartiles over the median."""
    if len(samples) < 2:
        return None
    lower, middle, upper = statistics.quantiles(samples, n=4)
    return (upper - lower) / 2 / middle


def _measured_config(name: str, rows: Sequence[BenchRow], weight_bytes: int) -> FlexiDepthConfig:
    """The model's configuration. Files do not name the adapters' width: it is that of the rows' ideal line."""
    if name not in SHAPES:
        raise CheckpointError(f"its model is {name!r}; wanted one of {', '.join(SHAPES)}")
    skipping = [row for row in rows if row.skip_got is not None]
    for factor in ADAPTER_FACTORS:
        config = shape_config(name, factor)
        lines = []
        for row in skipping:
            got = row.skip_got or 0.0
            if row.kind == DECODE:
                ours = ideal_speedup(config, got, weight_bytes=weight_bytes, context=_depth(row))
            else:
                tokens = int(row.test.removeprefix("pp"))
                dense = flops_of_prompt(config, tokens, 0.0, routers=False)
                ours = dense / flops_of_prompt(config, tokens, got / config.num_routed_layers)
            lines.append((ours, row.ideal or 0.0))
        if all(math.isclose(ours, theirs, rel_tol=_SAME_LINE) for ours, theirs in lines):
            return config
    raise CheckpointError(
        f"its ideal line is that of no {name} with adapters of ffn over "
        f"{', '.join(map(str, ADAPTER_FACTORS))} in the last half of the layers"
    )


def _of_gpu_check(content: dict[str, Any], folder: str) -> Iterator[Series]:
    """Decoding of each model, batch and context, and prompts, in bfloat16."""
    machine = Machine(content["bandwidth"] / 1e9, _COPY_SHARE, CUDA_PHASES, CUDA_LATENCY)
    for engine in content["engines"]:
        name = engine["model"]
        if name not in NAMES:
            raise CheckpointError(f"its model is {name!r}; wanted one of {', '.join(NAMES)}")
        config = model_config(name)
        overlap = ", kernels overlap" if engine["overlap"] else ""
        settings = dict.fromkeys((row["batch"], row["context"]) for row in engine["decode"])
        for batch, context in settings:
            words = f"batch {batch}, context {context}{overlap}"
            steps = [
                Row(
                    "dense" if row["skipped"] is None else f"skip {row['skipped']}",
                    row["skipped"],
                    row["ms"] / 1e3,
                )
                for row in engine["decode"]
                if (row["batch"], row["context"]) == (batch, context)
            ]
            setting = Setting(folder, name, "bfloat16", words)
            yield decode_series(setting, steps, machine, config, BF16, batch=batch, context=context)
        for tokens in dict.fromkeys(row["tokens"] for row in engine["prompts"]):
            rows = [
                Row(
                    "dense" if row["share"] is None else f"skip {row['share']:.0%}",
                    row["share"],
                    row["seconds"],
                )
                for row in engine["prompts"]
                if row["tokens"] == tokens
            ]
            setting = Setting(folder, name, "bfloat16", f"prompt of {tokens}{overlap}")
            yield prompt_series(setting, rows, config, tokens)
