"""What is measured at a point: one row for each figure of a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

Key = tuple[str, str, float, str]  # part, method, layers asked, subject


@dataclass(frozen=True)
class Row:
    """Common to all rows. method, asked: of the point. subject: what was measured, the name of a set, a task or
    a kind. skipped: layers that a token skipped in the mean. seconds: it took."""

    part: ClassVar[str]

    method: str
    asked: float
    subject: str
    skipped: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the name of the part."""
        return {"part": self.part, **asdict(self)}

    @property
    def key(self) -> Key:
        """Equal for rows that say the same about the same point."""
        return self.part, self.method, float(self.asked), self.subject


@dataclass(frozen=True)
class TextRow(Row):
    """A set of held-out texts.

    perplexity: of `predictions` tokens. ratio: to the base model's; nats: its logarithm, and nats_stderr the
    standard error of that. agreement: share of positions with the base model's first choice.
    bytes_per_token: weights read by decoding one token with so many layers skipped.
    """

    part = "text"

    predictions: int
    perplexity: float
    ratio: float
    nats: float
    nats_stderr: float
    agreement: float
    bytes_per_token: float


@dataclass(frozen=True)
class TaskRow(Row):
    """A multiple-choice task; see `choices.ChoiceScore`."""

    part = "task"

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    bytes_per_token: float


@dataclass(frozen=True)
class AnswersRow(Row):
    """Greedy answers to prompts.

    identical: share whose first 32 tokens are the base model's. never_ending: share cut off at
    max_new_tokens; base_never_ending: of the base model's.
    """

    part = "answers"

    answers: int
    identical: float
    never_ending: float
    base_never_ending: float


@dataclass(frozen=True)
class KindRow(Row):
    """Layers used by a kind of task; see `kinds.KindUse`. skipped: in the answers."""

    part = "kind"

    prompt_layers: float
    answer_layers: float
    answer_stderr: float
    run_rates: list[float]
    routing_layers: list[int]
    prompt_tokens: int
    answer_tokens: int


_PARTS: dict[str, type[Row]] = {row.part: row for row in (TextRow, TaskRow, AnswersRow, KindRow)}


def row_from_dict(values: dict[str, Any]) -> Row:
    """What `to_dict` gave, out of JSON, where numbers that are none have become null."""
    rest: dict[str, Any] = {
        key: float("nan") if value is None else value for key, value in values.items()
    }
    return _PARTS[rest.pop("part")](**rest)
