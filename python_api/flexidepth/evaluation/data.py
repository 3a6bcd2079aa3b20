"""Everything that is measured on, read and tokenised before the first model is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .kinds import made_prompts
from .options import EvalOptions
from .questions import (
    EncodedQuestion,
    encode_question,
    is_multiple_choice,
    read_questions,
    task_files,
)
from .texts import Messages, TextSet, read_text_set

_MOST_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class EvalData:
    """sets: held-out texts. tasks: {name: questions}. prompts: to be answered greedily. kinds: {kind: prompts}
    of made-up tasks. calibration: windows of token ids. calibrated_on: where these come from, in words."""

    sets: list[TextSet]
    tasks: dict[str, list[EncodedQuestion]]
    prompts: list[Messages]
    kinds: dict[str, list[Messages]]
    calibration: list[list[int]]
    calibrated_on: str


def read_data(options: EvalOptions, tokenizer: Any, notify: Callable[[str], None]) -> EvalData:
    """Read what the options name; a task file that is no multiple choice is said and left out.

    Raises:
        ValueOutOfRangeError, UnsupportedError, OSError: a file that cannot be used.
    """
    if tokenizer is None:
        raise UnsupportedError(
            f"eval: {options.model} came without a tokenizer; evaluation needs one to read texts"
        )
    share = options.calibration_tokens // max(1, len(options.texts))
    sets = [
        read_text_set(
            name,
            path,
            tokenizer,
            tokens=options.tokens,
            window=options.window,
            calibration_tokens=share if options.calibration is None else 0,
            num_prompts=4 * options.answers,
        )
        for name, path in options.texts.items()
    ]
    calibration, source = _calibration(options, sets, tokenizer)
    prompts = _in_turn([[p for p in s.prompts if _is_short(p, tokenizer)] for s in sets])
    kinds = {}
    if options.per_kind and getattr(tokenizer, "chat_template", None) is not None:
        documents = [document for text_set in sets for document in text_set.documents]
        kinds = made_prompts(options.per_kind, options.seed, documents, notify)
    return EvalData(
        sets,
        {} if options.tasks is None else _read_tasks(options, tokenizer, notify),
        prompts[: options.answers],
        kinds,
        calibration,
        source,
    )


def _calibration(
    options: EvalOptions, sets: list[TextSet], tokenizer: Any
) -> tuple[list[list[int]], str]:
    """(windows, where they come from)."""
    most = options.calibration_tokens
    if options.calibration is not None:
        own = read_text_set(
            "calibration", options.calibration, tokenizer, tokens=most, window=options.window
        )
        return own.windows, str(options.calibration)
    if all(text_set.calibration for text_set in sets):
        return [w for s in sets for w in s.calibration], "the text behind the measured part"
    windows: list[list[int]] = []
    for text_set in sets:
        room = most // len(sets)
        for window in text_set.windows:
            if room >= 2:
                windows.append(window[:room])
            room -= len(window)
    return windows, "the measured text itself, because a file holds no more"


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
