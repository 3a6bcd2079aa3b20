"""What every peer offers, so that a benchmark can time any of them beside the engine."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata, util
from pathlib import Path
from typing import Any, ClassVar

import torch

from flexidepth.base_model import base_config_of, base_model_of
from flexidepth.checkpoints import Checkpoint
from flexidepth.checkpoints.fingerprint import tensors_fingerprint
from flexidepth.initialization import is_routing

from ..timing import Case

_SEED = 0
_REASON = 400  # characters of a reason; the end of a log says most


class PeerUnavailable(Exception):
    """A peer cannot run here; the message says why, and what would change it."""

    def __init__(self, reason: str) -> None:
        super().__init__(shorten(reason))


@dataclass(frozen=True)
class MissingPeer:
    """The row of a peer that could not run; threads: None where it could not run with any."""

    name: str
    reason: str
    threads: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class PeerSetup:
    """What all peers of a run share.

    checkpoint: the model that the engine runs; peers get its base model. dtype: of the engine's weights.
    positions: tokens that the longest case holds, read and chosen ones: depth, steps and warm-up of a turn, or
    a prompt and one more. device: "cpu" or "cuda". folder: where converted models are kept; None = beside the
    default model.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    positions: int
    device: str = "cpu"
    folder: Path | None = None

    @cached_property
    def base_model(self) -> Any:
        """The base model as transformers' own class, in `dtype` on `device`."""
        return self._base_model().to(self.dtype).to(self.device)

    @cached_property
    def float32_model(self) -> Any:
        """The same in float32, of the weights as they are stored."""
        return self._base_model().to(self.device)

    @cached_property
    def digest(self) -> str:
        """sha256 in hex of the base model's configuration and weights as they are stored."""
        digest = hashlib.sha256(base_config_of(self.checkpoint.config).to_json_string().encode())
        weights = (pair for pair in self.checkpoint.tensors() if not is_routing(pair[0]))
        digest.update(tensors_fingerprint(weights).encode())
        return digest.hexdigest()

    def _base_model(self) -> Any:
        return base_model_of(self.checkpoint.config, self.checkpoint.tensors())


class Session(ABC):
    """A loaded model with a cache for one sequence, greedy, without a tokenizer.

    Sessions of peers that are loaded from files take only plain values, so that a trial can make one in a
    process of its own.
    """

    @abstractmethod
    def start(self, ids: Sequence[int]) -> int:
        """Empty the cache, read `ids` (one at least) and choose the token behind them."""

    @abstractmethod
    def step(self) -> int:
        """Read the token chosen last and choose the next: what a decode case times."""

    def prompt(self, ids: Sequence[int]) -> int:
        """What a prompt case times: `start`, unless there is a faster way that cannot decode."""
        return self.start(ids)

    def close(self) -> None:
        """Free the model and all that belongs to it."""
        self.__dict__.clear()


class Peer(ABC):
    """Another runtime on the same base model.

    A peer holds one session at a time: a case is good until the next is made with other threads, or until
    `close`. Constructing prepares everything that does not depend on threads; files are converted then.
    """

    title: ClassVar[str]
    package: ClassVar[str]  # as pip names it

    def __init__(self, setup: PeerSetup) -> None:
        self.setup = setup
        self.chosen: list[int] = []  # by the last case since its start, for those who compare
        self._session: tuple[int, Session] | None = None

    @property
    @abstractmethod
    def short_precision(self) -> str:
        """Of weights and products, as the row's name has it."""

    @property
    def precision(self) -> str:
        """Of weights, products and cache, in words."""
        return f"{self.short_precision} weights, products and cache"

    @property
    def name(self) -> str:
        """As the row says it."""
        return f"{self.title} {self.short_precision}"

    @property
    def version(self) -> str:
        """Of the package."""
        return metadata.version(self.package)

    @abstractmethod
    def open(self, threads: int) -> Session:
        """A new session; raises PeerUnavailable, or what the other runtime raises."""

    def load(self, threads: int) -> Session:
        """The session with so many threads, opened once.

        Raises:
            PeerUnavailable: it cannot be opened.
        """
        if self._session is None or self._session[0] != threads:
            self.close()
            self._session = threads, _guarded(lambda: self.open(threads))
        return self._session[1]

    def decode_case(self, depth: int, threads: int) -> Case:
        """One token a step at batch 1, behind `depth` tokens; tried once, so that whatever is made or compiled
        on first use is there.

        Raises:
            PeerUnavailable: it cannot be opened, or its first step failed.
        """
        session = self.load(threads)
        ids = token_ids(self.setup.checkpoint.config.vocab_size, depth)

        def start() -> None:
            self.chosen[:] = [session.start(ids)]

        def step() -> None:
            self.chosen.append(session.step())

        def trial() -> None:
            start()
            step()

        _guarded(trial)
        return Case(self.name, step, start, foreign=True, note=self.precision)

    def prompt_case(self, tokens: int, threads: int) -> Case:
        """A whole prompt into an empty cache and the choice of one token; tried once.

        Raises:
            PeerUnavailable: see `decode_case`.
        """
        session = self.load(threads)
        ids = token_ids(self.setup.checkpoint.config.vocab_size, tokens)

        def step() -> None:
            self.chosen[:] = [session.prompt(ids)]

        _guarded(step)
        return Case(self.name, step, foreign=True, note=self.precision)

    def close(self) -> None:
        """Free the session."""
        if self._session is not None:
            self._session[1].close()
            self._session = None


def token_ids(vocab_size: int, count: int) -> list[int]:
    """The ids that every peer reads: all different, or rotary embedding would not show in the answers."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


def require(module: str, extra: str) -> None:
    """PeerUnavailable with the command that installs it, if `module` is not there."""
    if util.find_spec(module) is None:
        raise PeerUnavailable(f'not installed: pip install "flexidepth[{extra}]" adds it')


def short_name(dtype: torch.dtype) -> str:
    """ "f32", "bf16"."""
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def shorten(text: str) -> str:
    """On one line, its beginning and its end."""
    line = " ".join(text.split())
    return line if len(line) <= _REASON else f"{line[: _REASON // 2]} ... {line[-_REASON // 2 :]}"


def _guarded(call: Callable[[], Any]) -> Any:
    """What others' code raises becomes PeerUnavailable: a peer that fails is a row, not the end of the run."""
    try:
        return call()
    except PeerUnavailable:
        raise
    except Exception as error:
        raise PeerUnavailable(f"{type(error).__name__}: {error}") from error
