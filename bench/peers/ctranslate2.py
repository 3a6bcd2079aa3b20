"""CTranslate2: its generation loop, held after each token."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import PeerUnavailable, Session, short_name
from .files import FilePeer, exported, run_apart

_CONVERT = "from ctranslate2.converters.transformers import main; main()"


class CTranslate2Session(Session):
    """Timed: one turn of `Generator.generate_batch` (forward pass, greedy choice), from letting its callback go
    until the callback brings the next token; two hand-overs between threads are in it, some ten microseconds.

    The loop is CTranslate2's own: it has no call for one step that keeps a cache. compute_type: see CTranslate2.
    """

    def __init__(
        self, path: str, positions: int, threads: int, device: str, compute_type: str
    ) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            path,
            device=device,
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=threads,
        )
        self.positions = positions
        self.loop: _HeldLoop | None = None

    def start(self, ids: Sequence[int]) -> int:
        self._end()
        room = self.positions - len(ids)
        self.loop = _HeldLoop(self.generator, ids, room)
        return self.loop.next()

    def step(self) -> int:
        assert self.loop is not None, "start comes before step"
        return self.loop.next()

    def prompt(self, ids: Sequence[int]) -> int:
        self._end()
        return int(_generate(self.generator, ids, 1)[0].sequences_ids[0][0])

    def _end(self) -> None:
        if self.loop is not None:
            self.loop.end()
            self.loop = None

    def close(self) -> None:
        self._end()
        self.generator.unload_model()


class _HeldLoop:
    """A generation in a thread of its own, which waits in its callback until `next` wants one more token."""

    def __init__(self, generator: Any, ids: Sequence[int], room: int) -> None:
        self.wanted, self.there = threading.Semaphore(0), threading.Semaphore(0)
        self.ended, self.running = False, True
        self.token = -1
        self.error: Exception | None = None
        arguments = (generator, list(ids), room)
        self.thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self.thread.start()
        atexit.register(self.end)  # CTranslate2 joins its threads at exit, and one waits here

    def _run(self, generator: Any, ids: Sequence[int], room: int) -> None:
        self.wanted.acquire()
        try:
            if not self.ended:
                _generate(generator, ids, room, callback=self._hold)
        except Exception as error:  # raised again where it is waited for
            self.error = error
        finally:
            self.running = False
            self.there.release()

    def _hold(self, result: Any) -> bool:
        self.token = int(result.token_id)
        self.there.release()
        self.wanted.acquire()
        return self.ended

    def next(self) -> int:
        """One more token."""
        self.wanted.release()
        self.there.acquire()
        if not self.running:
            raise self.error or RuntimeError("CTranslate2 ended the sequence")
        return self.token

    def end(self) -> None:
        """Stop; waits for the step in progress."""
        self.ended = True
        self.wanted.release()
        self.thread.join()
        atexit.unregister(self.end)


def _generate(generator: Any, ids: Sequence[int], count: int, **more: Any) -> Any:
    """Greedily `count` tokens and no end before: min_length masks the token for it."""
    return generator.generate_batch(
        [[str(token) for token in ids]],
        min_length=count,
        max_length=count,
        beam_size=1,
        sampling_topk=1,
        include_prompt_in_result=False,
        **more,
    )


class CTranslate2(FilePeer):
    """In the engine's type where the device computes in it; else, as on all CPUs so far, in float32."""

    title = "CTranslate2"
    package = "ctranslate2"
    module = "ctranslate2"
    extra = "peers-ctranslate2"
    session = CTranslate2Session

    def check(self) -> None:
        """CUDA needs a build that sees a device; not every rotary embedding can be converted."""
        import ctranslate2

        if self.setup.device == "cuda" and not ctranslate2.get_cuda_device_count():
            raise PeerUnavailable("this ctranslate2 sees no CUDA device")
        if self.setup.checkpoint.config.rope_parameters["rope_type"] == "llama3":
            raise PeerUnavailable(
                "its files have no place for the factor and the original positions of llama3's rotary "
                "embedding; it would compute something else"
            )

    @property
    def compute_type(self) -> str:
        """As CTranslate2 names it."""
        import ctranslate2

        wanted = str(self.setup.dtype).removeprefix("torch.")
        able = ctranslate2.get_supported_compute_types(self.setup.device)
        return wanted if wanted in able else "float32"

    @property
    def short_precision(self) -> str:
        """Of the products."""
        return self.compute_type

    @property
    def precision(self) -> str:
        """The values are those of the run."""
        if self.compute_type == str(self.setup.dtype).removeprefix("torch."):
            return super().precision
        kept = short_name(self.setup.dtype)
        return f"weights rounded to {kept}, computed in float32, float32 cache"

    @property
    def file_name(self) -> str:
        """The file's type is the engine's: it is converted when loaded."""
        return f"ctranslate2-{self.version}"

    def convert(self, target: Path) -> None:
        """By CTranslate2's own converter."""
        source = exported(self.setup)
        kept = str(self.setup.dtype).removeprefix("torch.")
        command = ["-c", _CONVERT, "--model", str(source), "--output_dir", str(target)]
        run_apart(
            [*command, "--quantization", kept],
            "CTranslate2's converter could not convert the model",
        )

    def arguments(self, threads: int) -> dict[str, Any]:
        """See CTranslate2Session."""
        return {
            "positions": self.setup.positions,
            "threads": threads,
            "device": self.setup.device,
            "compute_type": self.compute_type,
        }
