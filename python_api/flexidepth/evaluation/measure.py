"""All figures of a point, each kept as soon as it is measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..config import FlexiDepthConfig
from .answers import Answers, answer_prompts
from .choices import score_questions
from .costs import bytes_read
from .data import ANSWERS, EvalData
from .kinds import measure_kind
from .points import BASE, Point, base_point
from .record import Record
from .rows import AnswersRow, Key, KindRow, Row, TaskRow, TextRow
from .texts import TextSet
from .windows import Trace, trace_windows

if TYPE_CHECKING:
    from ..llm import FlexiDepth


class Measurer:
    """Measures points on one set of data.

    What the base model makes of the data is computed once, by the evaluated model with every layer forced to run
    (`prepare_base`): another one would round otherwise, and rows would depend on where a run was interrupted.

    Args:
        config: of the model that is evaluated; its adapters' width counts in the bytes of the baselines.
        weight_bytes: of a weight.
    """

    def __init__(
        self,
        data: EvalData,
        record: Record,
        *,
        config: FlexiDepthConfig,
        weight_bytes: int,
        max_new_tokens: int,
        notify: Callable[[str], None],
    ) -> None:
        self.data, self.record, self.config = data, record, config
        self.weight_bytes, self.max_new_tokens, self.notify = weight_bytes, max_new_tokens, notify
        # The base model on the beginning of the calibration text, for others to be compared with.
        self.base_reference: Trace | None = None
        self._base_traces: dict[str, Trace] = {}
        self._base_answers: Answers | None = None

    def missing(self, method: str, asked: float) -> list[Key]:
        """Keys of the rows of a point that are yet to be measured."""
        keys = [("text", method, asked, text_set.name) for text_set in self.data.sets]
        keys += [("task", method, asked, name) for name in self.data.tasks]
        if self.data.prompts:
            keys.append(("answers", method, asked, ""))
        return [key for key in keys if key not in self.record.rows]

    def prepare_base(self, llm: FlexiDepth, points: Iterable[tuple[str, float]]) -> None:
        """Measure the base model, and have what it makes of all that is yet to be measured.

        Args:
            points: (method, layers asked) of all that the run is to measure.
        """
        self.measure(llm, base_point())
        missing = {
            (part, subject) for point in points for part, _, _, subject in self.missing(*point)
        }
        for text_set in self.data.sets:
            if ("text", text_set.name) in missing and text_set.name not in self._base_traces:
                self._trace_base(llm, text_set)
        if ANSWERS in missing and self._base_answers is None:
            self._answer_base(llm)

    def measure(
        self, llm: FlexiDepth, point: Point, config: FlexiDepthConfig | None = None
    ) -> None:
        """Measure what is missing of a point.

        config: of the model whose adapters the point uses; None = the evaluated one's.
        """
        missing = set(self.missing(point.method, point.asked))
        if not missing:
            return
        self.record.add_point(point)
        for row in self._rows(llm, point, config or self.config, missing):
            self.record.add(row)
            self.notify(_line(row))

    def measure_kinds(self, llm: FlexiDepth, point: Point) -> None:
        """Count the layers used by each kind of made-up task, where that is missing."""
        for kind, prompts in self.data.kinds.items():
            if ("kind", point.method, float(point.asked), kind) in self.record.rows:
                continue
            begin = time.perf_counter()
            use = measure_kind(llm, kind, prompts, point)
            values = dataclasses.asdict(use)
            del values["kind"]
            if (point.method, float(point.asked)) not in self.record.points:
                self.record.add_point(point)
            self.record.add(
                KindRow(
                    method=point.method,
                    asked=point.asked,
                    subject=kind,
                    skipped=llm.config.num_hidden_layers - use.answer_layers,
                    seconds=time.perf_counter() - begin,
                    **values,
                )
            )
            self.notify(f"{_name(point)}: {kind}, {use.answer_layers:.1f} layers used")

    def _rows(
        self, llm: FlexiDepth, point: Point, config: FlexiDepthConfig, missing: set[Key]
    ) -> Iterator[Row]:
        for part, _, _, subject in sorted(missing, key=self._order):
            base = self.record.rows.get((part, BASE, 0.0, subject))
            if point.same_as_base and base is not None:
                yield self._copied(base, point, config)
                continue
            own = point.at((part, subject))
            if own is None:
                continue
            begin = time.perf_counter()
            values = self._values(llm, own, part, subject)
            if part != "answers":
                values["bytes_per_token"] = self._bytes(point, config, values["skipped"])
            kind = {"text": TextRow, "task": TaskRow, "answers": AnswersRow}[part]
            yield kind(
                method=point.method,
                asked=point.asked,
                subject=subject,
                seconds=time.perf_counter() - begin,
                **values,
            )

    def _order(self, key: Key) -> tuple[int, int]:
        """Where a row stands among those of its point."""
        part, _, _, subject = key
        names = [text_set.name for text_set in self.data.sets] if part == "text" else []
        names += list(self.data.tasks) if part == "task" else []
        return ("text", "task", "answers").index(part), names.index(subject) if names else 0

    def _copied(self, base: Row, point: Point, config: FlexiDepthConfig) -> Row:
        changes: dict[str, Any] = {"method": point.method, "asked": point.asked, "seconds": 0.0}
        if hasattr(base, "bytes_per_token"):
            changes["bytes_per_token"] = self._bytes(point, config, 0.0)
        return dataclasses.replace(base, **changes)

    def _bytes(self, point: Point, config: FlexiDepthConfig, skipped: float) -> float:
        return bytes_read(point.method, config, skipped, self.weight_bytes)

    def _values(self, llm: FlexiDepth, point: Point, part: str, subject: str) -> dict[str, Any]:
        if part == "text":
            text_set = next(s for s in self.data.sets if s.name == subject)
            return self._text(llm, point, text_set)
        if part == "task":
            score = score_questions(llm.engine, self.data.tasks[subject], point)
            return dataclasses.asdict(score)
        return self._answers(llm, point)

    def _text(self, llm: FlexiDepth, point: Point, text_set: TextSet) -> dict[str, Any]:
        if point.method == BASE:
            self._trace_base(llm, text_set)
        trace = base = self._base_traces[text_set.name]
        if not point.same_as_base:
            trace = trace_windows(llm.engine, text_set.windows, point)
        nats, error = trace.difference(base)
        ratio = math.inf
        with suppress(OverflowError):
            ratio = math.exp(nats)
        return {
            "skipped": trace.skipped,
            "predictions": text_set.predictions,
            "perplexity": trace.perplexity,
            "ratio": ratio,
            "nats": nats,
            "nats_stderr": error,
            "agreement": trace.agreement(base),
        }

    def _answers(self, llm: FlexiDepth, point: Point) -> dict[str, Any]:
        if point.method == BASE:
            self._answer_base(llm)
        base = own = self._base_answers
        assert base is not None and own is not None  # by prepare_base
        if not point.same_as_base:
            own = answer_prompts(llm, self.data.prompts, point, self.max_new_tokens)
        return {
            "skipped": own.skipped,
            "answers": len(own.tokens),
            "identical": own.identical(base),
            "never_ending": own.never_ending,
            "base_never_ending": base.never_ending,
        }

    def _trace_base(self, llm: FlexiDepth, text_set: TextSet) -> None:
        trace = trace_windows(llm.engine, text_set.windows, base_point())
        self._base_traces[text_set.name] = trace

    def _answer_base(self, llm: FlexiDepth) -> None:
        self._base_answers = answer_prompts(
            llm, self.data.prompts, base_point(), self.max_new_tokens
        )


def _name(point: Point) -> str:
    return f"{point.method}, {point.asked:g} layers skipped"


def _line(row: Row) -> str:
    """A row in a line, for those who wait."""
    head = f"{row.method}, {row.asked:g} layers skipped: "
    if isinstance(row, TextRow):
        return f"{head}{row.subject}, perplexity {row.perplexity:.2f}, {row.ratio:.3f} x base"
    if isinstance(row, TaskRow):
        return f"{head}{row.subject}, acc {row.acc:.1%}, acc_norm {row.acc_norm:.1%}"
    assert isinstance(row, AnswersRow)
    return f"{head}answers, {row.identical:.0%} begin as the base model's"
