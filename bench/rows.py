"""One line of a table of results, of every kind: decoding, prompts, peers, and what could not run."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .timing import rounds_noise

DENSE = "dense"
DECODE, PROMPT = "decode", "prompt"
NOISY_CORES = 0.1  # of other programs, while a row was measured
NOISY_ROUNDS = 0.05  # standard deviation of its rounds' medians


@dataclass(frozen=True)
class BenchRow:
    """What was measured, and what came out.

    kind: "decode" or "prompt". test: in llama-bench's words, tg = tokens generated, pp = prompt processed, d = depth of
    the cache. threads: of the CPU. batch: sequences side by side. name: "dense", a plan's, or a peer's. peer: whether
    it is one. said: why there are no figures, or what they mean.

    skip_asked, skip_got: layers skipped by a token, in the mean; None where that is not ours to say. ms_median, ms_p99:
    of a token of each sequence (decode) or of a whole prompt, milliseconds. tps_mean, tps_std: tokens per second. work:
    10^9 bytes read (decode) or multiply-adds x 2 (prompt) a second; given: GB/s at which as many bytes are merely read
    on this CPU, over and over, in the same turns (two sizes are measured, the others lie between them); given_noise: as
    `noise`, of these reads; work_share: of that, on other devices of their bandwidth. speedup: over our dense pass of
    the same setting. ideal: what bytes or arithmetic allow; ideal_reads: what mere reads of the bytes make of it.
    over_peers: our speed over each peer's. logits_rmse, gate_agreement, peak_mb: see `bench.accuracy`, `bench.memory`.
    others_cores: processors that other programs used meanwhile. samples: seconds of each step; blocks: how
    many belong to each round.
    """

    model: str
    device: str
    dtype: str
    threads: int | None
    batch: int
    kind: str
    test: str
    name: str
    peer: bool = False
    said: str = ""
    skip_asked: float | None = None
    skip_got: float | None = None
    ms_median: float | None = None
    ms_p99: float | None = None
    tps_mean: float | None = None
    tps_std: float | None = None
    work: float | None = None
    given: float | None = None
    given_noise: float | None = None
    work_share: float | None = None
    speedup: float | None = None
    ideal: float | None = None
    of_ideal: float | None = None
    ideal_reads: float | None = None
    of_reads: float | None = None
    over_peers: Mapping[str, float] = field(default_factory=dict)
    logits_rmse: float | None = None
    gate_agreement: float | None = None
    peak_mb: float | None = None
    others_cores: float | None = None
    samples: Sequence[float] = ()
    blocks: Sequence[int] = ()

    @property
    def group(self) -> tuple[Any, ...]:
        """What rows that are compared with each other share: they were measured in turn."""
        return self.model, self.device, self.dtype, self.threads, self.batch, self.kind, self.test

    @property
    def key(self) -> tuple[Any, ...]:
        """Names a row within a run and across runs."""
        return (*self.group, self.name)

    @property
    def noisy(self) -> bool:
        """Whether other programs ran meanwhile, or rounds differed by much for another reason."""
        busy = self.others_cores is not None and self.others_cores > NOISY_CORES
        return busy or self.noise > NOISY_ROUNDS

    @property
    def tps_median(self) -> float | None:
        """Tokens per second at the median time."""
        if self.ms_median is None:
            return None
        tokens = self.batch if self.kind == DECODE else int(self.test.removeprefix("pp"))
        return 1e3 * tokens / self.ms_median

    @property
    def noise(self) -> float:
        """Standard deviation of the rounds' medians, as a share of the median: what a run of the same may differ by.
        NaN where there were fewer than two rounds."""
        return rounds_noise(self.samples, self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every sample included."""
        return {**dataclasses.asdict(self), "noisy": self.noisy}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchRow:
        """The inverse; TypeError or KeyError where `values` is not a row."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def timed(samples: Sequence[float], tokens: int) -> dict[str, Any]:
    """Fields of a row out of seconds of steps of so many tokens."""
    ordered = sorted(samples)
    rates = [tokens / s for s in samples]
    return {
        "ms_median": statistics.median(samples) * 1e3,
        "ms_p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e3,
        "tps_mean": statistics.fmean(rates),
        "tps_std": statistics.stdev(rates) if len(rates) > 1 else 0.0,
    }


def with_comparisons(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Rows of one group with their speed over our dense pass and over each peer."""
    base = next((r for r in rows if r.name == DENSE and not r.peer), None)
    dense = None if base is None else base.ms_median
    given = None if base is None else base.given
    peers = {row.name: row.ms_median for row in rows if row.peer and row.ms_median}
    done = []
    for row in rows:
        if row.ms_median is None:
            done.append(row)
            continue
        speedup = None if dense is None else dense / row.ms_median
        of_ideal = None if speedup is None or row.ideal is None else speedup / row.ideal
        reads = of_reads = None
        if row.ideal is not None and row.given is not None and given is not None:
            reads = row.ideal * row.given / given
            of_reads = None if speedup is None else speedup / reads
        done.append(
            dataclasses.replace(
                row,
                speedup=speedup,
                of_ideal=of_ideal,
                ideal_reads=reads,
                of_reads=of_reads,
                over_peers={}
                if row.peer
                else {name: ms / row.ms_median for name, ms in peers.items()},
            )
        )
    return done
