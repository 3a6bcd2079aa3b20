"""Peers that load a model from files of their own format: conversion, done once, and a trial."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from flexidepth.checkpoints.default_model import cache_directory

from .base import Peer, PeerSetup, PeerUnavailable, Session, require, short_name

_LOG_LINES = 5


class FilePeer(Peer):
    """A peer that is loaded from `path`, which a subclass makes of the exported base model.

    Both the conversion and a first trial of every number of threads run in processes of their own: they write
    what they like from C, and one that is killed by a signal is a reason, not the end of the benchmark.
    """

    module: ClassVar[str]  # that must be importable
    extra: ClassVar[str]  # of pyproject.toml
    session: ClassVar[type[Session]]

    def __init__(self, setup: PeerSetup) -> None:
        super().__init__(setup)
        require(self.module, self.extra)
        self.check()
        self.path = made_once(model_folder(setup) / self.file_name, self.convert)

    def check(self) -> None:
        """PeerUnavailable for what cannot be run, before anything is converted."""

    @property
    @abstractmethod
    def file_name(self) -> str:
        """Of the converted model, a file or a folder; another one for another precision or version."""

    @abstractmethod
    def convert(self, target: Path) -> None:
        """Make `target`."""

    @abstractmethod
    def arguments(self, threads: int) -> dict[str, Any]:
        """Plain arguments of a session, beside its path."""

    def open(self, threads: int) -> Session:
        """A session, after a trial in a process of its own."""
        arguments = {"path": str(self.path), **self.arguments(threads)}
        session = type(self).session
        wanted = json.dumps([session.__module__, session.__qualname__, arguments])
        run_apart(
            ["-m", f"{__package__}.trial", wanted], f"its trial with threads = {threads} failed"
        )
        return session(**arguments)


def model_folder(setup: PeerSetup) -> Path:
    """Where what is made of this base model in this type is kept; named after weights and configuration."""
    folder = setup.folder or cache_directory() / "peers"
    return folder / f"{setup.digest[:16]}-{short_name(setup.dtype)}"


def exported(setup: PeerSetup) -> Path:
    """The base model saved as transformers does, in the engine's type; what converters read."""

    def save(target: Path) -> None:
        setup.base_model.save_pretrained(target)
        _stand_in_tokenizer(setup.checkpoint.config.vocab_size).save_pretrained(target)

    return made_once(model_folder(setup) / "transformers", save)


def _stand_in_tokenizer(vocab_size: int) -> Any:
    """Token i is written "i": converters want a tokenizer, and nothing here turns text into tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(vocab_size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="0", bos_token="1", eos_token="2", pad_token="0"
    )


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, a file or folder, made under another name first: what is there is whole."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        make(partial)
        with suppress(FileExistsError):  # another process was faster
            partial.rename(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
    return target


def run_apart(arguments: Sequence[str], failed: str) -> None:
    """Run Python with `arguments`, silently.

    Raises:
        PeerUnavailable: it failed; says how it ended and the last lines of its log.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        check=False,
    )
    if result.returncode != 0:
        log = result.stdout.decode(errors="replace").replace("\r", "\n").strip().splitlines()
        end = "; ".join(line.strip() for line in log[-_LOG_LINES:] if line.strip())
        raise PeerUnavailable(f"{failed} ({_ended(result.returncode)}){': ' if end else ''}{end}")


def _ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-code).name}"
    return f"killed by signal {-code}"
