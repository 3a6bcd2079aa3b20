"""The peers of a setting: prepared once, timed in turn with our cases; one that cannot run is a reason in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexidepth.checkpoints import Checkpoint

from .options import BenchOptions, Setting, places
from .peers import PeerSetup, available, decode_cases, peer_names, prompt_cases
from .peers.base import MissingPeer, Peer
from .timing import Case


class PeerSet:
    """Peers of a model, a device and a type.

    reasons: {name: why it is not there}, for the setting that was chosen last.
    """

    def __init__(
        self,
        options: BenchOptions,
        checkpoint: Checkpoint,
        setting: Setting,
        notify: Callable[[str], None],
    ) -> None:
        names: Sequence[str] = options.peers
        if "all" in names:
            names = peer_names(setting.dtype)
        decoding = places(max(options.depths, default=0), options.steps) if options.steps else 0
        positions = max([decoding, *(tokens + 1 for tokens in options.prompts)])
        setup = PeerSetup(checkpoint, setting.dtype, positions, setting.device)
        self.key = setting.model, setting.device, setting.dtype
        self._peers: list[Peer]
        self._peers, self._missing = available(names, setup, notify)
        self._threads = 1
        self._failed: list[MissingPeer] = []

    def choose(self, threads: int | None) -> None:
        """Cases from now on take so many threads."""
        self._threads = threads or 1
        self._failed = []

    @property
    def reasons(self) -> dict[str, str]:
        """Of those that cannot run at all, and of those whose last cases could not be made."""
        return {peer.name: peer.reason for peer in (*self._missing, *self._failed)}

    def decode_cases(self, depth: int) -> list[Case]:
        """One case a peer."""
        cases, self._failed = decode_cases(self._peers, depth, self._threads)
        return cases

    def prompt_cases(self, tokens: int) -> list[Case]:
        """One case a peer."""
        cases, self._failed = prompt_cases(self._peers, tokens, self._threads)
        return cases

    def close(self) -> None:
        """Give their memory back."""
        for peer in self._peers:
            peer.close()
