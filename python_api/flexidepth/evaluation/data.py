"""Everything that is measured on, read and tokenised before the first model is loaded."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from ..training.calibration_text import TokenSequence
from .kinds import made_prompts
from .options import EvalOptions
from .points import Subject
from .questions import (
    EncodedQuestion,
    encode_question,
    is_multiple_choice,
    read_questions,
    task_files,
)
from .texts import Messages, TextSet, beginning, read_text_set

_MOST_PROMPT_TOKENS = 512
_LEAST_CALIBRATION = 256  # tokens behind the measured part of a file that are worth a search
ANSWERS: Subject = ("answers", "")


@dataclass(frozen=True)
class CalibrationText:
    """What thresholds are found on. windows: token ids, and whose layers count. source: where they come from, in
    words."""

    windows: list[TokenSequence]
    source: str

    @property
    def tokens(self) -> int:
        """Tokens whose layers count."""
        return sum(sum(window.counted) for window in self.windows)

    @property
    def sequences(self) -> list[list[int]]:
        """The token ids alone."""
        return [window.ids for window in self.windows]

    @property
    def counted(self) -> list[list[bool]]:
        """Whether each token's layers count."""
        return [window.counted for window in self.windows]


@dataclass(frozen=True)
class EvalData:
    """sets: held-out texts. tasks: {name: questions}. prompts: to be answered greedily. kinds: {kind: prompts}
    of made-up tasks. calibration: what thresholds are found on, for each set of texts and each task its own, and for
    ANSWERS, which kinds and block influence share, text of all sets."""

    sets: list[TextSet]
    tasks: dict[str, list[EncodedQuestion]]
    prompts: list[Messages]
    kinds: dict[str, list[Messages]]
    calibration: dict[Subject, CalibrationText]

    @property
    def everything(self) -> CalibrationText:
        """What stands for all that is measured."""
        return self.calibration[ANSWERS]


def read_data(options: EvalOptions, tokenizer: Any, notify: Callable[[str], None]) -> EvalData:
    """Read what the options name; a task file that is no multiple choice is said and left out.

    Raises:
        ValueOutOfRangeError, UnsupportedError, OSError: a file that cannot be used.
    """
    if tokenizer is None:
        raise UnsupportedError(
            f"eval: {options.model} came without a tokenizer; evaluation needs one to read texts"
        )
    sets = [
        read_text_set(
            name,
            path,
            tokenizer,
            tokens=options.tokens,
            window=options.window,
            calibration_tokens=options.calibration_tokens,
            num_prompts=4 * options.answers,
        )
        for name, path in options.texts.items()
    ]
    tasks = {} if options.tasks is None else _read_tasks(options, tokenizer, notify)
    most = options.calibration_tokens
    calibration = {("text", text_set.name): _of_texts(text_set, most) for text_set in sets}
    calibration |= {("task", name): of_questions(found, most) for name, found in tasks.items()}
    calibration[ANSWERS] = _of_all(options, sets, tokenizer)
    prompts = _in_turn([[p for p in s.prompts if _is_short(p, tokenizer)] for s in sets])
    kinds = {}
    if options.per_kind and getattr(tokenizer, "chat_template", None) is not None:
        documents = [document for text_set in sets for document in text_set.documents]
        kinds = made_prompts(options.per_kind, options.seed, documents, notify)
    return EvalData(sets, tasks, prompts[: options.answers], kinds, calibration)


def _of_all(options: EvalOptions, sets: Sequence[TextSet], tokenizer: Any) -> CalibrationText:
    """The file that was given, or as much of each set."""
    most = options.calibration_tokens
    if options.calibration is not None:
        own = read_text_set(
            "calibration", options.calibration, tokenizer, tokens=most, window=options.window
        )
        return CalibrationText(own.windows, str(options.calibration))
    behind = all(text_set.calibration for text_set in sets)
    windows = [
        window
        for text_set in sets
        for window in beginning(
            text_set.calibration if behind else text_set.windows, most // len(sets)
        )
    ]
    return CalibrationText(windows, _BEHIND if behind else _ITSELF)


_BEHIND = "the text behind the measured part"
_ITSELF = "the measured text itself, because a file holds no more"


def _of_texts(text_set: TextSet, most: int) -> CalibrationText:
    """A set's own text: what its file holds behind the measured part."""
    behind = CalibrationText(text_set.calibration, _BEHIND)
    if behind.tokens >= min(most, _LEAST_CALIBRATION):
        return behind
    return CalibrationText(beginning(text_set.windows, most), _ITSELF)


def of_questions(questions: Sequence[EncodedQuestion], most: int) -> CalibrationText:
    """Questions with their choices, whichever is right: each choice behind its context, which counts once as in
    `choices.score_questions`. Questions in a random order, until `most` tokens are to be computed."""
    windows: list[TokenSequence] = []
    for question in random.Random(0).sample(list(questions), len(questions)):
        if windows and sum(len(window.ids) for window in windows) >= most:
            break
        for number, choice in enumerate(question.choices):
            if number == 0 or len(choice) > 1:
                counted = [number == 0] * len(question.context) + [True] * (len(choice) - 1)
                windows.append(TokenSequence([*question.context, *choice[:-1]], counted))
    return CalibrationText(windows, "its own questions, without their answers")


def _read_tasks(
    options: EvalOptions, tokenizer: Any, notify: Callable[[str], None]
) -> dict[str, list[EncodedQuestion]]:
    assert options.tasks is not None
    tasks = {}
    for path in task_files(options.tasks):
        if options.tasks.is_dir() and not is_multiple_choice(path):
            notify(f"{path} is left out: no multiple-choice questions of a known form")
            continue
        questions = read_questions(path, options.limit)
        tasks[path.stem] = [encode_question(question, tokenizer) for question in questions]
    return tasks


def _in_turn(lists: list[list[Messages]]) -> list[Messages]:
    """The first of each list, the second of each, and so on."""
    rounds = zip_longest(*lists)
    return [prompt for taken in rounds for prompt in taken if prompt is not None]


def _is_short(prompt: Messages, tokenizer: Any) -> bool:
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return len(tokenizer.encode(text, add_special_tokens=False)) <= _MOST_PROMPT_TOKENS


def data_digests(options: EvalOptions) -> dict[str, str]:
    """{path: sha256} of every file of text and questions."""
    paths = list(options.texts.values())
    paths += [options.calibration] if options.calibration is not None else []
    paths += task_files(options.tasks) if options.tasks is not None else []
    return {str(path): file_digest([path]) for path in paths}


def model_digest(source: str) -> str:
    """sha256 over a model's configuration and weights, in the order of the names of their files."""
    path = Path(source)
    if not path.is_dir():
        return file_digest([path])
    return file_digest(sorted([*path.glob("config.json"), *path.glob("*.safetensors")]))


def file_digest(paths: list[Path]) -> str:
    """sha256 of files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
