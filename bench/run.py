"""A whole benchmark run: engines in turn, cases in turn, rows kept as they come."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexidepth.checkpoints import Checkpoint
from flexidepth.errors import FlexiDepthError
from flexidepth.loading import load_engine, resolve_device
from flexidepth_ext import _C
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.engine import Engine

from .accuracy import Reference, text_ids
from .bandwidth import read_bandwidth
from .decode import measure_decode
from .load import OtherPrograms, load_average
from .machine import describe_machine
from .models import RANDOM, open_model
from .options import BenchOptions, Setting, places
from .peer_set import PeerSet
from .plans import Plan, dense_plan, make_plans
from .prompt import measure_prompt
from .rows import DECODE, DENSE, PROMPT, BenchRow
from .timing import Spent

FORMAT = "flexidepth-bench-3"
_PROMPT_ROUNDS = 5
_BUSY = 0.5  # load before a run from which on it is said
Notify = Callable[[str], None]
Keep = Callable[[Sequence[BenchRow]], None]


@dataclass(frozen=True)
class BenchResult:
    """rows, and in header everything needed to measure them again."""

    header: dict[str, Any]
    rows: list[BenchRow]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every sample included."""
        return {**self.header, "rows": [row.to_dict() for row in self.rows]}


def run_bench(options: BenchOptions, notify: Notify, keep: Keep = lambda _: None) -> BenchResult:
    """Measure.

    Args:
        notify: gets a line of text for each stage. keep: gets the rows of each group of cases as soon as they are
            measured.

    Raises:
        ValueOutOfRangeError: what a model cannot do. CheckpointError, OSError: a model that cannot be read. A setting
            that does not fit the memory, or whose device is not there, becomes a row that says so.
    """
    checkpoints = {
        name: open_model(name, prefer_hub=options.prefer_hub, notify=notify)
        for name in options.models
    }
    for checkpoint in checkpoints.values():
        skips = options.check_fits(checkpoint.config)
        make_plans(options.routing, skips, checkpoint.config)
    load_before = load_average()
    if load_before > _BUSY:
        notify(f"warning: the machine is busy (load {load_before:.2f}); figures will be noisy")
    run = _Run(options, checkpoints, notify, keep)
    try:
        for setting in options.settings(_C.available_threads()):
            run.measure(setting)
    finally:
        run.close()
    header: dict[str, Any] = {
        "format": FORMAT,
        "models": {name: _describe(checkpoint) for name, checkpoint in checkpoints.items()},
        "routing": options.routing,
        "command": "flexidepth " + shlex.join(sys.argv[1:]),
        "machine": describe_machine(),
        "isa": _C.OpContext(1).isa,
        "load_before": load_before,
        "load_after": load_average(),
        "read_bandwidth_gb_per_s": run.bandwidth,
        "reads": run.reads,
        "seconds": dataclasses.asdict(run.spent),
        "harness_share": run.spent.harness_share,
        "accuracy": run.accuracy,
        "memory": run.memory,
        "breakdown": run.breakdown,
    }
    return BenchResult(header, run.rows)


def _describe(checkpoint: Checkpoint) -> dict[str, int]:
    config = checkpoint.config
    return {
        "num_layers": config.num_hidden_layers,
        "routed_layers": config.num_routed_layers,
    }


class _Run:
    """The state of a run: what is known once for several settings, and the rows."""

    def __init__(
        self,
        options: BenchOptions,
        checkpoints: dict[str, Checkpoint],
        notify: Notify,
        keep: Keep,
    ) -> None:
        self.options, self.checkpoints, self.notify, self.keep = options, checkpoints, notify, keep
        self.rows: list[BenchRow] = []
        self.spent = Spent()
        self.bandwidth: dict[str, float] = {}
        self.reads: list[dict[str, Any]] = []
        self.accuracy: dict[str, Any] = {}
        self.memory: dict[str, Any] = {}
        self.breakdown: list[dict[str, Any]] = []
        self._answers: dict[tuple[str, ...], tuple[float, float | None]] = {}
        self._peers: PeerSet | None = None
        self._reference: Reference | None = None

    def measure(self, setting: Setting) -> None:
        """Every case of a setting."""
        checkpoint = self.checkpoints[setting.model]
        where = f"{setting.threads} threads" if setting.threads else setting.device
        self.notify(f"{setting.model}, {setting.dtype_name}, {where}")
        try:
            runtime = resolve_device(setting.device)
            engine = load_engine(
                checkpoint,
                setting.dtype,
                num_threads=setting.threads,
                strict_router=False,
                progress=None,
                runtime=runtime,
                max_length=self._positions(checkpoint) if runtime is not None else None,
            )
        except FlexiDepthError as error:
            self._add([self._said(setting, str(error))])
            return
        try:
            self._measure(setting, checkpoint, engine)
        finally:
            engine.close()

    def close(self) -> None:
        """Give the peers' memory back."""
        if self._peers is not None:
            self._peers.close()

    def _positions(self, checkpoint: Checkpoint) -> int:
        """Most tokens of a sequence that any case needs."""
        options = self.options
        decoding = places(max(options.depths, default=0), options.steps)
        wanted = max(512, decoding, *options.prompts)
        return min(wanted, int(checkpoint.config.max_position_embeddings))

    def _measure(
        self, setting: Setting, checkpoint: Checkpoint, engine: Engine | CudaEngine
    ) -> None:
        options, config = self.options, checkpoint.config
        bandwidth = self._bandwidth(setting)
        plans = make_plans(options.routing, options.check_fits(config), config)
        # The model's own routing says nothing about fillers.
        text = text_ids(checkpoint) if options.routing == "model" else None
        if options.peers:
            self._choose_peers(setting, checkpoint)
        self._memory(setting, checkpoint)
        for batch in options.batches if options.steps else ():
            for depth in options.depths:
                self.notify(f"decode, {batch} x tg{options.steps} @ d{depth}")
                peers = self._peers if batch == 1 else None
                others = OtherPrograms()
                try:
                    rows = measure_decode(
                        engine,
                        plans,
                        peers=peers.decode_cases(depth) if peers else (),
                        batch=batch,
                        depth=depth,
                        rounds=options.rounds,
                        steps=options.steps,
                        text=text,
                        setting=setting,
                        bandwidth=bandwidth,
                        spent=self.spent,
                        read_samples=self.reads,
                    )
                except (FlexiDepthError, MemoryError) as error:
                    test = f"tg{options.steps} @ d{depth}"
                    self._add([self._said(setting, _reason(error), DECODE, test, batch)])
                    continue
                self._finish(rows, others, engine, setting, [dense_plan(), *plans], peers)
        for tokens in filter(None, options.prompts):
            self.notify(f"prompt, pp{tokens}")
            shares = self._prompt_plans(checkpoint, plans)
            others = OtherPrograms()
            try:
                rows = measure_prompt(
                    engine,
                    tokens,
                    shares,
                    peers=self._peers.prompt_cases(tokens) if self._peers else (),
                    rounds=_PROMPT_ROUNDS,
                    text=text,
                    setting=setting,
                    spent=self.spent,
                )
            except (FlexiDepthError, MemoryError) as error:
                self._add([self._said(setting, _reason(error), PROMPT, f"pp{tokens}", 1)])
                continue
            self._finish(rows, others, engine, setting, [dense_plan(), *shares], self._peers)
        if options.breakdown and isinstance(engine, Engine) and options.steps:
            self._breakdown(engine, setting)

    def _choose_peers(self, setting: Setting, checkpoint: Checkpoint) -> None:
        """The peers of the setting before, where they are the same but for their threads."""
        key = setting.model, setting.device, setting.dtype
        if self._peers is None or self._peers.key != key:
            self.close()
            self._peers = PeerSet(self.options, checkpoint, setting, self.notify)
        self._peers.choose(setting.threads)

    def _prompt_plans(self, checkpoint: Checkpoint, plans: list[Plan]) -> list[Plan]:
        """Shares of the routed layers; with the model's own or a recorded routing what decoding takes, too."""
        options, routed = self.options, checkpoint.config.num_routed_layers
        if options.routing not in ("random", "fixed"):
            return plans
        skips = list(dict.fromkeys(round(share * routed) for share in options.shares))
        return make_plans(options.routing, skips, checkpoint.config)

    def _finish(
        self,
        rows: list[BenchRow],
        others: OtherPrograms,
        engine: Engine | CudaEngine,
        setting: Setting,
        plans: Sequence[Plan],
        peers: PeerSet | None,
    ) -> None:
        """Add what is known of rows beside their times, and keep them."""
        cores = others.cores()
        if cores is not None and cores > 0.1:
            self.notify(f"warning: other programs used {cores:.2f} processors meanwhile")
        by_name = {plan.name: plan for plan in plans}
        memory = self.memory.get(f"{setting.model}, {setting.dtype_name}")
        done = []
        for row in rows:
            known: dict[str, Any] = {"others_cores": cores}
            if not row.peer:
                if memory is not None and setting.device == "cpu":
                    known["peak_mb"] = memory["peak_bytes"] / 1e6
                if self.options.accuracy:
                    answers = self._accuracy(setting, engine, by_name[row.name])
                    known["logits_rmse"], known["gate_agreement"] = answers
            done.append(dataclasses.replace(row, **known))
        if peers is not None:
            done += [
                dataclasses.replace(rows[0], **_NO_FIGURES, name=name, peer=True, said=reason)
                for name, reason in peers.reasons.items()
            ]
        self._add(done)

    def _add(self, rows: list[BenchRow]) -> None:
        self.rows += rows
        self.keep(rows)

    def _said(
        self,
        setting: Setting,
        reason: str,
        kind: str | None = None,
        test: str | None = None,
        batch: int | None = None,
    ) -> BenchRow:
        """A row in place of all that a setting, or a test of it, would have had."""
        self.notify(f"left out: {reason}")
        options = self.options
        return BenchRow(
            **setting.fields(),
            batch=batch or options.batches[0],
            kind=kind or (DECODE if options.steps else PROMPT),
            test=test or (f"tg{options.steps}" if options.steps else f"pp{options.prompts[0]}"),
            name=DENSE,
            said=reason,
        )

    def _bandwidth(self, setting: Setting) -> float:
        key = setting.device if setting.threads is None else f"{setting.threads} threads"
        if key not in self.bandwidth:
            if setting.threads is not None:
                self.bandwidth[key] = read_bandwidth(setting.threads)
            else:
                from .gpu.timing import copy_bandwidth

                self.bandwidth[key] = copy_bandwidth() / 1e9
        return self.bandwidth[key]

    def _accuracy(
        self, setting: Setting, engine: Engine | CudaEngine, plan: Plan
    ) -> tuple[float, float | None]:
        """Of a plan; threads and batches change no bit of it."""
        name = f"{setting.model}, {setting.dtype_name}, {setting.device}"
        key = name, plan.name
        if key not in self._answers:
            self.notify(f"accuracy: {plan.name}")
            checkpoint = self.checkpoints[setting.model]
            if self._reference is None or self._reference.checkpoint is not checkpoint:
                self._reference = Reference(checkpoint)
            if name not in self.accuracy and engine.num_routed:
                self.accuracy[name] = self._reference.summary(engine).to_dict()
            self._answers[key] = self._reference.compare(engine, plan)
        return self._answers[key]

    def _memory(self, setting: Setting, checkpoint: Checkpoint) -> None:
        """Measured once for a model and a type; what goes wrong there costs no row."""
        from .memory import measure_memory

        key = f"{setting.model}, {setting.dtype_name}"
        wanted = self.options.memory and setting.device == "cpu"
        if key in self.memory or not wanted or setting.model.startswith(RANDOM):
            return
        self.notify("memory, in a process of its own")
        try:
            # by its path: the same file, and nothing is fetched again
            self.memory[key] = measure_memory(checkpoint.source, setting.dtype_name)
        except FlexiDepthError as error:
            self.memory[key] = None
            self.notify(str(error))

    def _breakdown(self, engine: Engine, setting: Setting) -> None:
        from .breakdown import measure_breakdown

        run, skipped = make_plans("fixed", [0, engine.num_routed], engine.config)
        for depth in self.options.depths:
            self.notify(f"where the time of a token goes, d{depth}")
            dense = next(
                (
                    row
                    for row in self.rows
                    if row.name == DENSE
                    and row.batch == 1
                    and row.test == f"tg{self.options.steps} @ d{depth}"
                    and (row.model, row.device, row.dtype, row.threads)
                    == (setting.model, setting.device, setting.dtype_name, setting.threads)
                ),
                None,
            )
            if dense is None or dense.work is None:
                self.notify(
                    "left out: it wants the dense pass of a single sequence (-b 1) beside it"
                )
                continue
            found = measure_breakdown(engine, run, skipped, depth, dense.work, model=setting.model)
            self.breakdown.append(found.to_dict())


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


_NO_FIGURES: dict[str, Any] = {
    f.name: f.default
    for f in dataclasses.fields(BenchRow)
    if f.default is not dataclasses.MISSING and f.name not in ("peer", "said")
} | {"over_peers": {}}
