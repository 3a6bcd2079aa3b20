"""The peers of a setting: loaded once, timed in turn with our cases; one that cannot run is a reason in the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flexidepth.checkpoints import Checkpoint

from .options import Setting
from .timing import Case


class PeerSet:
    """reasons: {name: why it is not there}."""

    def __init__(
        self,
        names: Sequence[str],
        checkpoint: Checkpoint,
        setting: Setting,
        notify: Callable[[str], None],
    ) -> None:
        self.reasons: dict[str, str] = {}
        self._peers: list[Any] = []

    def decode_cases(self, depth: int, steps: int) -> list[Case]:
        """One case a peer."""
        return []

    def prompt_cases(self, tokens: int) -> list[Case]:
        """One case a peer."""
        return []

    def close(self) -> None:
        """Give their memory back."""
