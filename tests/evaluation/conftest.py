"""A tiny routed model with a byte tokenizer, saved as a checkpoint, and files to evaluate it on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flexidepth import FlexiDepth, open_checkpoint, save_checkpoint
from flexidepth.checkpoints import Checkpoint
from flexidepth.evaluation.options import EvalOptions
from flexidepth.training.calibration_text import TokenSequence
from tests.api.tokenizers import byte_tokenizer
from tests.engine.conftest import tiny_config, tiny_model, weights_of

Make = Callable[..., EvalOptions]

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "saw"),
    *("that", "it", "was", "good", "to", "be", "there", "at", "noon"),
)


def save_tiny(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Four layers, the last three routed; the same base weights for the same seed."""
    sizes = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257}
    config = tiny_config(**sizes, **changes)
    base = dict(weights_of(tiny_model(tiny_config(**sizes), seed)))
    tensors = [
        (name, tensor if ".router." in name or ".adapter." in name else base[name])
        for name, tensor in weights_of(tiny_model(config, seed))
    ]
    return save_checkpoint(config, tensors, folder, tokenizer=byte_tokenizer())


def sentence(number: int, words: int = 12) -> str:
    """A text that depends on its number."""
    picked = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(words)]
    return " ".join([str(number), *picked])


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """A jsonl file."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def all_counted(windows: Sequence[list[int]]) -> list[TokenSequence]:
    """Windows all of whose tokens count."""
    return [TokenSequence(window, [True] * len(window)) for window in windows]


CALIBRATION = [
    {"layers_skipped": 0.0, "thresholds": [0.0, 0.0, 0.0]},
    {"layers_skipped": 1.0, "thresholds": [0.4, 0.5, 0.6]},
    {"layers_skipped": 2.5, "thresholds": [0.5, 0.6, 0.7]},
]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", calibration=CALIBRATION)


@pytest.fixture(scope="session")
def checkpoint(model: Path) -> Checkpoint:
    return open_checkpoint(model)


@pytest.fixture
def llm(model: Path) -> Iterator[FlexiDepth]:
    with FlexiDepth.from_pretrained(model, dtype="float32", num_threads=1) as made:
        yield made


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "prose.jsonl"
    return write_lines(path, [{"text": sentence(i)} for i in range(40)])


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "chat.jsonl"
    talks = [
        [
            {"role": "user", "content": sentence(i, 5)},
            {"role": "assistant", "content": sentence(i + 1, 9)},
        ]
        for i in range(30)
    ]
    return write_lines(path, [{"messages": talk} for talk in talks])


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_lines(
        folder / "letters.jsonl",
        [
            {
                "query": f"Question: {sentence(i, 4)}?\nAnswer:",
                "choices": ["A", "B"],
                "gold": i % 2,
            }
            for i in range(12)
        ],
    )
    write_lines(
        folder / "words.jsonl",
        [
            {"goal": sentence(i, 4), "sol1": sentence(i + 2, 3), "sol2": "no", "label": str(i % 2)}
            for i in range(12)
        ],
    )
    write_lines(folder / "other.jsonl", [{"context": "1 + 1", "answer": "2"}])
    return folder


@pytest.fixture
def windows() -> list[list[int]]:
    """Three windows of token ids, one longer than an engine call."""
    tokenizer = byte_tokenizer()
    text = " ".join(sentence(i) for i in range(20))
    ids = list(tokenizer.encode(text))
    return [ids[:300], ids[300:400], ids[400:440]]


@pytest.fixture
def make(model: Path, prose: Path, chat: Path) -> Make:
    """Options for a small run; arguments change them."""

    def options(**changes: Any) -> EvalOptions:
        values: dict[str, Any] = {
            "model": str(model),
            "texts": {"prose": prose, "chat": chat},
            "skipped": [0, 1, 2],
            "tokens": 200,
            "window": 100,
            "calibration_tokens": 200,
            "limit": 6,
            "answers": 2,
            "max_new_tokens": 8,
            "per_kind": 0,
            "dtype": "float32",
            "num_threads": 1,
        }
        return EvalOptions(**{**values, **changes})

    return options
