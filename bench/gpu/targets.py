"""What the engine is meant to reach on a device, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine_report import EngineReport
    from .engine_timing import DecodeRow

_LARGE, _SMALL = "llama-3-8b", "smollm2-135m"
_HALF = 0.5  # of a prompt's routed layers


@dataclass(frozen=True)
class Target:
    """what: in words. wanted: the least value, or with `most` the largest; found: the one measured."""

    what: str
    wanted: float
    found: float
    most: bool = False

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.found <= self.wanted if self.most else self.found >= self.wanted

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "met": self.met}


def targets(report: EngineReport) -> list[Target]:
    """Of one model; only those whose rows were measured."""
    if report.model == _LARGE:
        return list(_of_large(report))
    if report.model == _SMALL:
        return [
            Target(f"dense, context {row.context}: microseconds a token", 500, 1e3 * row.ms, True)
            for row in _alone(report.decode)
            if row.skipped is None
        ][:1]
    return []


def target_lines(found: Sequence[Target]) -> list[str]:
    """A table; nothing where there are none."""
    if not found:
        return []
    lines = ["", "| target | wanted | found | |", "|---|--:|--:|---|"]
    for t in found:
        sign = "at most" if t.most else "at least"
        lines.append(
            f"| {t.what} | {sign} {t.wanted:.3g} | {t.found:.3f} | {'met' if t.met else 'MISSED'} |"
        )
    return lines


def _alone(rows: Sequence[DecodeRow]) -> list[DecodeRow]:
    return [row for row in rows if row.batch == 1]


def _of_large(report: EngineReport) -> Iterator[Target]:
    alone = _alone(report.decode)
    for context in dict.fromkeys(row.context for row in alone):
        rows = [row for row in alone if row.context == context]
        where = f"context {context}: "
        dense = next(row for row in rows if row.skipped is None)
        yield Target(f"{where}dense, share of a copy's bandwidth", 0.85, dense.share)
        peers = [peer.ms for peer in report.peers if peer.ms and peer.context == context]
        if peers:
            yield Target(f"{where}dense over the best peer", 1.05, min(peers) / dense.ms)
        for row in rows:
            if row.skipped == 0:
                yield Target(
                    f"{where}every layer run over dense, time", 1.03, 1 / row.speedup, True
                )
            elif row.skipped is not None and row.skipped == report.routed // 2:
                yield Target(f"{where}{row.skipped} skipped, x dense", 1.2, row.speedup)
        routed = [row for row in rows if row.skipped is not None]
        if routed:
            least = min(routed, key=lambda row: row.speedup / row.ideal)
            yield Target(
                f"{where}least of ideal, at {least.skipped} skipped",
                0.95,
                least.speedup / least.ideal,
            )
    together = [row for row in report.decode if row.batch > 1 and row.skipped is not None]
    for batch, context in dict.fromkeys((row.batch, row.context) for row in together):
        own = [row for row in together if (row.batch, row.context) == (batch, context)]
        yield from _of_batch(f"{batch} sequences, context {context}: ", own)
    for prompt in report.prompts:
        if prompt.share == _HALF:
            what = f"prompt of {prompt.tokens}, half skipped, time over that by arithmetic"
            yield Target(what, 1.1, prompt.ideal / prompt.speedup, True)


def _of_batch(where: str, rows: Sequence[DecodeRow]) -> Iterator[Target]:
    """Rows that skip. With few layers skipped nearly every one is run by some sequence: routers and adapters are read
    beside them, and no engine is faster than dense then."""
    if able := [row for row in rows if row.ideal >= 1]:
        slowest = min(able, key=lambda row: row.speedup)
        what = f"{where}least x dense where bytes allow 1, at {slowest.skipped} skipped"
        yield Target(what, 1.0, slowest.speedup)
    least = min(rows, key=lambda row: row.speedup / row.ideal)
    what = f"{where}least of ideal, at {least.skipped} skipped"
    yield Target(what, 0.95, least.speedup / least.ideal)
