"""Calibration: thresholds for wanted mean numbers of layers skipped a token, measured on held-out text.

All thresholds move together: tau_l = sigmoid(logit(tau0_l) + b), tau0 the configuration's. The mean number of
layers skipped grows with the offset b; which b gives a wanted number is searched by runs of the engine, because
gates of later layers depend on what earlier ones decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..arguments import as_number
from ..dial import PRESETS, TOLERANCE, logit, reached_presets
from ..errors import UnsupportedError, ValueOutOfRangeError
from ..generation.inputs import to_ids
from ..llm import FlexiDepth

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine

    from ..modeling import FlexiDepthForCausalLM

DEFAULT_TARGETS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
_LIMIT = 40.0  # of the offset: beyond it tau is 0 or 1 in float32, whatever tau0
_NARROWEST = 1e-7  # a bracket of offsets that float32 thresholds still tell apart
_RUNS_PER_TARGET = 30
_HALVINGS = 40  # of 80 logits: to 1e-10
_SPREAD = (1 / 8, 1 / 2)  # of the routed layers, for first runs that serve every target


@dataclass(frozen=True)
class CalibrationPoint:
    """What was found for one target: layers_skipped is the measured mean, thresholds one tau a routed layer."""

    wanted: float
    layers_skipped: float
    offset: float
    thresholds: list[float]


@dataclass(frozen=True)
class Calibration:
    """Points ascending in layers skipped; tokens of text they were measured on; runs over it that it took; layers that
    the configuration's own thresholds skip, which hold where nothing is asked for."""

    points: list[CalibrationPoint]
    tokens: int
    runs: int
    unasked: float

    def config_fields(self, presets: Mapping[str, float] | None = None) -> dict[str, Any]:
        """`calibration` and `skip_presets` of FlexiDepthConfig.

        presets: names of the model's own, on top of the usual ones; those that the points reach are kept.
        """
        points = [
            {"layers_skipped": round(point.layers_skipped, 4), "thresholds": point.thresholds}
            for point in self.points
        ]
        reached = reached_presets(points, {**PRESETS, **(presets or {})})
        return {"calibration": points, "skip_presets": reached}


@dataclass(frozen=True)
class _Trial:
    """One run: mean layers skipped, and every gate's margin logit(w) - logit(tau0), ascending [tokens x layers].

    A gate skips where its margin is at most the offset.
    """

    offset: float
    layers_skipped: float
    margins: Tensor

    def skips(self, offset: float) -> int:
        """Gates that would skip under another offset, were they the same."""
        return int(torch.searchsorted(self.margins, offset, right=True))


def calibrate(
    model: FlexiDepth | FlexiDepthForCausalLM,
    token_sequences: Iterable[Sequence[int]],
    targets: Sequence[float] | None = None,
    *,
    counted: Iterable[Sequence[bool]] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    num_threads: int | None = None,
    on_run: Callable[[float, float], None] | None = None,
) -> Calibration:
    """Find the thresholds under which a token skips each of `targets` layers on average.

    Args:
        model: a loaded FlexiDepth, on whose engine it runs; or a FlexiDepthForCausalLM, for which an engine is
            made (`dtype`, `num_threads`).
        token_sequences: held-out texts as token ids; 4,000 to 8,000 tokens in all do. Each fits the model's
            positions.
        counted: for each sequence which of its tokens the mean is over; None = all.
        targets: mean layers skipped a token, ascending, from 0 to the number of routed layers; None = those of
            DEFAULT_TARGETS that are below it.
        on_run: called with (offset, layers skipped) after each run over the texts.

    Raises:
        ValueOutOfRangeError: targets that cannot be reached or not be told apart by this text, no text, or
            tokens outside the vocabulary. UnsupportedError: a model without routed layers.
    """
    config = model.config
    wanted = _check_targets(targets, config.num_routed_layers)
    longest = int(config.max_position_embeddings)
    texts = [_check_text(ids, config.vocab_size, longest) for ids in token_sequences]
    if not texts:
        raise ValueOutOfRangeError("calibrate: no text; give at least one sequence of token ids")
    masks = _check_counted(counted, texts)
    if isinstance(model, FlexiDepth):
        search = _Search(model.engine, texts, masks, on_run)
        points = [search.find(target) for target in wanted]
    else:
        with closing(_engine_of(model, dtype, num_threads)) as engine:
            search = _Search(engine, texts, masks, on_run)
            points = [search.find(target) for target in wanted]
    return Calibration(points, search.tokens, len(search.trials), search.unasked())


def calibrate_each(
    model: FlexiDepth,
    token_sequences: Iterable[Sequence[int]],
    targets: Iterable[float],
    *,
    counted: Iterable[Sequence[bool]] | None = None,
) -> dict[float, CalibrationPoint | ValueOutOfRangeError]:
    """As `calibrate`, but what is found for a target depends on no other one, and one that fails stops none.

    The first runs, which lie wide apart, are the same whatever is wanted and serve all; from there on each search sees
    its own runs alone. That takes about as many as sharing all of them does.

    Returns:
        For each target its point, or the error that says why there is none.
    """
    config = model.config
    longest = int(config.max_position_embeddings)
    texts = [_check_text(ids, config.vocab_size, longest) for ids in token_sequences]
    wanted = [
        target for one in targets for target in _check_targets([one], config.num_routed_layers)
    ]
    first = _Search(model.engine, texts, _check_counted(counted, texts), None)
    first.spread()
    found: dict[float, CalibrationPoint | ValueOutOfRangeError] = {}
    for target in wanted:
        try:
            found[target] = first.copy().find(target)
        except ValueOutOfRangeError as error:
            found[target] = error
    return found


class _Search:
    """Runs of the engine over the same texts under different offsets, each kept for the targets to come."""

    def __init__(
        self,
        engine: Engine,
        texts: list[Tensor],
        counted: list[Tensor],
        on_run: Callable[[float, float], None] | None,
    ) -> None:
        self.engine, self.texts, self.counted, self.on_run = engine, texts, counted, on_run
        taus = [logit(tau) for tau in engine.config.router_thresholds]
        self.start = torch.tensor(taus, dtype=torch.float64)
        self.tokens = sum(int(mask.sum()) for mask in counted)
        self.trials: list[_Trial] = []

    def spread(self) -> None:
        """Three runs wide apart, of which the latter two skip about some share of the routed layers."""
        self.run(0.0)
        for share in _SPREAD:
            offset = self.guess(-_LIMIT, _LIMIT, share * self.engine.num_routed)
            if all(trial.offset != offset for trial in self.trials):
                self.run(offset)

    def unasked(self) -> float:
        """Layers skipped under the thresholds that the search starts from."""
        return next(trial.layers_skipped for trial in self.trials if trial.offset == 0)

    def copy(self) -> _Search:
        """One that goes its own way from the runs there are."""
        other = _Search(self.engine, self.texts, self.counted, self.on_run)
        other.trials = list(self.trials)
        return other

    def find(self, target: float) -> CalibrationPoint:
        """The thresholds under which `target` layers are skipped, give or take the tolerance."""
        if not self.trials:
            self.run(0.0)
        for number in range(_RUNS_PER_TARGET):
            best = min(self.trials, key=lambda trial: abs(trial.layers_skipped - target))
            if abs(best.layers_skipped - target) <= TOLERANCE:
                thresholds = self.thresholds(best.offset).tolist()
                return CalibrationPoint(target, best.layers_skipped, best.offset, thresholds)
            low = max((t.offset for t in self.trials if t.layers_skipped < target), default=-_LIMIT)
            high = min((t.offset for t in self.trials if t.layers_skipped > target), default=_LIMIT)
            if high - low < _NARROWEST:
                break
            # The gates of earlier runs tell nearly where; bisection helps where they mislead.
            guess = self.guess(low, high, target)
            inside = low < guess < high and number % 4 != 3
            self.run(guess if inside else (low + high) / 2)
        found = sorted(trial.layers_skipped for trial in self.trials)
        raise ValueOutOfRangeError(
            f"calibrate: {target:g} layers skipped cannot be met within {TOLERANCE} on {self.tokens} tokens: "
            f"the nearest were {_nearest(found, target)}; give more text (4,000 tokens or more) or other targets"
        )

    def guess(self, low: float, high: float, target: float) -> float:
        """The least offset between two that is foretold to skip `target` layers."""
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.foretold(middle) < target:
                low = middle
            else:
                high = middle
        return high

    def foretold(self, offset: float) -> float:
        """Layers skipped under an offset, by the gates of the runs nearest to it on both sides.

        Exact at either run: gates change with the decisions before them, and between the runs by degrees.
        """
        below = max((t for t in self.trials if t.offset <= offset), key=_offset, default=None)
        above = min((t for t in self.trials if t.offset >= offset), key=_offset, default=None)
        one, other = below or above, above or below
        assert one is not None and other is not None  # there is a run before any guess
        width = other.offset - one.offset
        part = (offset - one.offset) / width if width else 0.0
        return (1 - part) * one.skips(offset) / self.tokens + part * other.skips(
            offset
        ) / self.tokens

    def thresholds(self, offset: float) -> Tensor:
        """tau [routed layers], float32 as the engine takes them."""
        return torch.sigmoid(self.start + offset).float()

    def run(self, offset: float) -> None:
        """Route all texts under an offset, each from its beginning, as many in an engine call as it takes."""
        thresholds = self.thresholds(offset)
        skipped, gates = 0, []
        for numbers in _filled([len(ids) for ids in self.texts], self.engine.max_rows):
            caches = [self.engine.new_cache(len(self.texts[i])) for i in numbers]
            ids = torch.cat([self.texts[i] for i in numbers])
            counted = torch.cat([self.counted[i] for i in numbers])
            rows = self.engine.max_rows
            # Only one text alone takes more than one call.
            for chunk, own in zip(torch.split(ids, rows), torch.split(counted, rows), strict=True):
                counts = (
                    [len(chunk)] if len(numbers) == 1 else [len(self.texts[i]) for i in numbers]
                )
                step = self.engine.forward(chunk, counts, caches, thresholds=thresholds)
                skipped += int((step.ran[own] == 0).sum())
                gates.append(step.gates[own])
            for cache in caches:
                cache.release()
        margins = torch.logit(torch.cat(gates).double()) - self.start
        trial = _Trial(offset, skipped / self.tokens, margins.flatten().sort().values)
        self.trials.append(trial)
        if self.on_run is not None:
            self.on_run(offset, trial.layers_skipped)


def _filled(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Numbers of the texts of each engine call, in order: as many as fill `rows`; a longer one is alone."""
    calls: list[list[int]] = []
    used = rows
    for number, length in enumerate(lengths):
        if used + length > rows:
            calls.append([])
            used = 0
        calls[-1].append(number)
        used += length
    return calls


def _offset(trial: _Trial) -> float:
    return trial.offset


def _engine_of(model: FlexiDepthForCausalLM, dtype: torch.dtype, num_threads: int | None) -> Engine:
    from flexidepth_ext.engine import Engine

    tied = model.config.tie_word_embeddings
    tensors = (
        (name, tensor.cpu())
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    )
    return Engine(model.config, tensors, dtype=dtype, num_threads=num_threads)


def _check_targets(targets: Sequence[float] | None, num_routed: int) -> list[float]:
    if num_routed == 0:
        raise UnsupportedError("calibrate: this model routes no layer; there is nothing to skip")
    if targets is None:
        return [target for target in DEFAULT_TARGETS if target < num_routed]
    numbers = [as_number(target) for target in targets]
    for target, number in zip(targets, numbers, strict=True):
        if number is None or not 0 <= number <= num_routed:
            raise ValueOutOfRangeError(
                f"calibrate: target {target!r}; wanted 0 to {num_routed} layers, the routed ones of this model"
            )
    ascending = [number for number in numbers if number is not None]
    near = [b for a, b in pairwise(ascending) if b - a <= 2 * TOLERANCE]
    if near or not ascending:
        raise ValueOutOfRangeError(
            f"calibrate: targets {ascending}; wanted one or more, ascending by more than {2 * TOLERANCE}"
        )
    return ascending


def _check_text(ids: Sequence[int], vocab_size: int, longest: int) -> Tensor:
    checked = to_ids(ids, None, vocab_size)
    if len(checked) > longest:
        raise ValueOutOfRangeError(
            f"calibrate: a text of {len(checked)} tokens; this model has {longest} positions; cut it"
        )
    return torch.tensor(checked, dtype=torch.int32)


def _check_counted(
    counted: Iterable[Sequence[bool]] | None, texts: Sequence[Tensor]
) -> list[Tensor]:
    if counted is None:
        return [torch.ones(len(ids), dtype=torch.bool) for ids in texts]
    masks = [torch.tensor(list(mask), dtype=torch.bool) for mask in counted]
    if [len(mask) for mask in masks] != [len(ids) for ids in texts]:
        raise ValueOutOfRangeError(
            f"calibrate: counted has {[len(m) for m in masks][:5]} values for {len(texts)} texts of "
            f"{[len(t) for t in texts][:5]} tokens; wanted one for each token"
        )
    if not any(bool(mask.any()) for mask in masks):
        raise ValueOutOfRangeError(
            "calibrate: no token counts; of conversations what the assistant says does, so give some with answers"
        )
    return masks


def _nearest(found: list[float], target: float) -> str:
    below = [value for value in found if value < target][-1:]
    above = [value for value in found if value > target][:1]
    return " and ".join(f"{value:.3f}" for value in (*below, *above))
