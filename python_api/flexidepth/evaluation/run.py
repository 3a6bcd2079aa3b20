"""A whole evaluation: models in turn, points in turn, rows kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench.machine import describe_machine
from ..checkpoints import Checkpoint, open_checkpoint
from ..errors import ValueOutOfRangeError
from ..llm import FlexiDepth
from ..loading import load_engine, resolve_dtype
from ..training.calibration_text import TokenSequence
from .ablation import without_adapters
from .data import ANSWERS, read_data
from .header import make_header, make_identity
from .influence import block_influence
from .measure import Measurer
from .options import EvalOptions
from .points import (
    DIAL,
    FLEXIDEPTH,
    RANDOM,
    RANDOM_ADAPTERS,
    SHORTGPT,
    SHORTGPT_ROUTED,
    STATIC_ADAPTERS,
    Point,
    Subject,
    base_point,
    dropping_points,
    random_adapter_points,
    random_points,
)
from .record import Record
from .rows import Row
from .static_layers import static_points
from .thresholds import dial_points, routed_points
from .torch_engine import TorchEngine
from .windows import Trace, trace_windows

Notify = Callable[[str], None]
_COMPARED_TOKENS = 64
_SAME_BASE = 0.06  # nats a token by which two roundings of one base model may differ: all of it in bfloat16, 0.03


@dataclass(frozen=True)
class EvalResult:
    """header: what was measured, on what, with what, on which machine. points: how each point came about.
    rows: every figure, of rows.TextRow, TaskRow, AnswersRow, KindRow."""

    header: dict[str, Any]
    points: list[dict[str, Any]]
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.header,
            "points": self.points,
            "rows": [row.to_dict() for row in self.rows],
        }


def evaluate(
    options: EvalOptions,
    *,
    output_dir: Path | None = None,
    notify: Notify = lambda _: None,
) -> EvalResult:
    """Measure quality against layers skipped.

    Args:
        options: what to measure.
        output_dir: where rows are kept while the run goes on and results are written at its end; a run of the
            same options on the same files goes on where one before it was interrupted.
        notify: called with a line of text for each row.

    Raises:
        ValueOutOfRangeError: options that do not fit the model, or a further checkpoint of another base model.
        CheckpointError, UnsupportedError, SaveError, OSError: a file that cannot be read or written.
    """
    from .results import check_output, write_results

    if output_dir is not None:
        check_output(output_dir)
    checkpoint = open_checkpoint(options.model, prefer_hub=options.prefer_hub, notify=notify)
    options.check_fits(checkpoint.config)
    others = {name: open_checkpoint(model, notify=notify) for name, model in options.also.items()}
    data = read_data(options, checkpoint.tokenizer(), notify)
    machine = describe_machine()
    identity = make_identity(options, checkpoint, others, machine)
    record = Record(identity, output_dir, notify)
    dtype = resolve_dtype(options.dtype)
    measurer = Measurer(
        data,
        record,
        config=checkpoint.config,
        weight_bytes=torch.empty((), dtype=dtype).element_size(),
        max_new_tokens=options.max_new_tokens,
        notify=notify,
    )
    _measure_model(FLEXIDEPTH, checkpoint, options, measurer)
    _measure_baselines(checkpoint, options, measurer)
    for name, other in others.items():
        _measure_model(name, other, options, measurer)
    header = make_header(options, checkpoint, data, machine, record.identity)
    result = EvalResult(header, list(record.points.values()), list(record.rows.values()))
    if output_dir is not None:
        for path in write_results(result, output_dir):
            notify(f"wrote {path}")
        record.discard()
    return result


def _measure_model(
    method: str, checkpoint: Checkpoint, options: EvalOptions, measurer: Measurer
) -> None:
    """The points of a model with routers; of the evaluated one also the base model's and the dial's."""
    routed = checkpoint.config.num_routed_layers
    evaluated = method == FLEXIDEPTH
    wanted = not evaluated or FLEXIDEPTH in options.methods
    asked = _missing(measurer, method, [n for n in options.skipped if n <= routed])
    kinds = measurer.data.kinds if wanted and routed and not checkpoint.config.ablations else {}
    if not (evaluated or asked or kinds):
        return
    if checkpoint.config.ablations:
        names = ", ".join(checkpoint.config.ablations)
        measurer.notify(f"{method}: {names}; computed by the trainable model")
    with _loaded(checkpoint, options) as llm:
        data = measurer.data
        beginning = data.everything.sequences[0][:_COMPARED_TOKENS]
        whole = TokenSequence(beginning, [True] * len(beginning))
        trace = trace_windows(llm.engine, [whole], base_point())
        if evaluated:
            measurer.base_reference = trace
            measurer.prepare_base(llm, _all_points(options))
        _check_same_base(method, trace, measurer.base_reference)
        points = routed_points(method, llm, data, asked, measurer.notify) if wanted else []
        if evaluated:
            points += _other_points(llm, options, measurer)
        for point in points:
            measurer.measure(llm, point, checkpoint.config)
        if kinds:
            number = min(options.kinds_skipped, routed)
            (every,) = routed_points(method, llm, data, {number: [ANSWERS]}, measurer.notify)
            if (own := every.at(ANSWERS)) is not None:
                measurer.measure_kinds(llm, own)


def _missing(
    measurer: Measurer, method: str, numbers: Sequence[float]
) -> dict[float, list[Subject]]:
    """{layers asked: what is yet to be measured there}."""
    found = {n: [(part, name) for part, _, _, name in measurer.missing(method, n)] for n in numbers}
    return {number: subjects for number, subjects in found.items() if subjects}


def _other_points(llm: FlexiDepth, options: EvalOptions, measurer: Measurer) -> list[Point]:
    """Other ways than its own to route the evaluated model."""
    points: list[Point] = []
    if DIAL in options.methods:
        points += dial_points(llm.config, options.skipped, measurer.notify)
    whole = _whole_numbers(options)
    if STATIC_ADAPTERS in options.methods:
        missing = _missing(measurer, STATIC_ADAPTERS, whole)
        points += static_points(llm, measurer.data, missing, measurer.notify)
    if RANDOM_ADAPTERS in options.methods:
        routed = llm.config.num_routed_layers
        points += random_adapter_points(whole, routed, seed=options.seed)
    return points


def _whole_numbers(options: EvalOptions) -> list[int]:
    """What is asked of ways to route that skip as many layers of every token."""
    return [round(n) for n in options.skipped if float(n).is_integer()]


def _all_points(options: EvalOptions) -> list[tuple[str, float]]:
    """(method, layers asked) of whatever the options want."""
    return [(m, n) for m in (*options.methods, *options.also) for n in options.skipped]


def _measure_baselines(checkpoint: Checkpoint, options: EvalOptions, measurer: Measurer) -> None:
    """Layers skipped at random and layers dropped; numbers of layers that are not whole are left out."""
    whole = _whole_numbers(options)
    methods = [m for m in options.methods if m in (RANDOM, SHORTGPT, SHORTGPT_ROUTED)]
    if not any(measurer.missing(method, n) for method in methods for n in whole):
        return
    influence: list[float] = []
    if SHORTGPT in methods or SHORTGPT_ROUTED in methods:
        measurer.notify("block influence of each layer")
        influence = block_influence(checkpoint, measurer.data.everything.sequences)
    with _loaded(without_adapters(checkpoint), options) as llm:
        for method in methods:
            for point in _baseline_points(method, whole, checkpoint, options, llm, influence):
                measurer.measure(llm, point)


def _baseline_points(
    method: str,
    skipped: Sequence[float],
    checkpoint: Checkpoint,
    options: EvalOptions,
    llm: FlexiDepth,
    influence: Sequence[float],
) -> list[Point]:
    routed = checkpoint.config.routing_layers
    if method == RANDOM:
        return random_points(
            skipped, routed, llm.config, seed=options.seed, positions=llm.max_length
        )
    among = routed if method == SHORTGPT_ROUTED else range(len(influence))
    return dropping_points(method, skipped, influence, among)


@contextmanager
def _loaded(checkpoint: Checkpoint, options: EvalOptions) -> Iterator[FlexiDepth]:
    dtype = resolve_dtype(options.dtype)
    engine: Any
    if checkpoint.config.ablations:
        engine = TorchEngine(checkpoint, dtype)
    else:
        engine = load_engine(
            checkpoint,
            dtype,
            num_threads=options.num_threads,
            strict_router=False,
            progress=None,
        )
    with FlexiDepth(
        engine,
        checkpoint.config,
        checkpoint.tokenizer(),
        routers_trained=checkpoint.routers_trained,
        source=checkpoint.source,
    ) as llm:
        yield llm


def _check_same_base(method: str, own: Trace, base: Trace | None) -> None:
    """Raise where a further checkpoint makes something else of the same text, with every layer run."""
    assert base is not None  # the evaluated model comes first
    apart = float((own.logprobs - base.logprobs).abs().mean())
    if apart > _SAME_BASE:
        raise ValueOutOfRangeError(
            f"eval: {method!r} is of another base model: with every layer run its log-probabilities are {apart:.3f} "
            f"nats a token away, {_SAME_BASE} are allowed; leave it out, or evaluate it by itself"
        )
