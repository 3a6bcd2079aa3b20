"""The decoder loop: prefill in chunks, then one engine step a token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..routing import ForcedRouting
from .ahead import can_run_ahead, run_ahead
from .cache import PromptCache
from .params import GenerationParams
from .text import TextStream

if TYPE_CHECKING:
    from flexidepth_ext.cuda_decode import DecodeStep
    from flexidepth_ext.engine import Engine, StepResult

MAX_BATCH = 8  # sequences in one engine step
_SEQUENCE_STRIDE = 0x632BE59BD9B4E019  # odd; gives each returned sequence a seed of its own


@dataclass
class Sequence:
    """One answer in the making."""

    prompt: list[int]
    cache: PromptCache
    stream: TextStream
    eos: frozenset[int]
    seed: int
    cached_tokens: int = 0
    keeps_cache: bool = False  # the cache is the caller's, who goes on with it
    # An answer to the same prompt, whose computed prompt this one copies.
    twin: Sequence | None = None
    copies_due: int = 0  # answers that have yet to copy this one's prompt
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    ran: list[Tensor] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logits: Tensor | None = None
    prompt_chunks: int = 0  # engine calls of the prompt, the first entries of gates and ran
    prefill_s: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0

    def record(self, step: StepResult | DecodeStep, rows: slice) -> None:
        """Keep gates and decisions of this sequence's rows of a step."""
        self.gates.append(step.gates[rows])
        self.ran.append(step.ran[rows])


@dataclass(frozen=True)
class TokenEvent:
    """One new token: which sequence, the token, the text it releases, its log-probability."""

    index: int
    token_id: int
    delta: str
    logprob: float
    finish_reason: str | None


class Decoder:
    """Runs sequences through an engine under one set of parameters."""

    def __init__(
        self,
        engine: Engine,
        params: GenerationParams,
        routing: ForcedRouting,
        thresholds: Tensor | None,
    ) -> None:
        self.engine, self.params, self.routing, self.thresholds = (
            engine,
            params,
            routing,
            thresholds,
        )

    def run(self, sequences: list[Sequence]) -> Iterator[TokenEvent]:
        """Yield tokens as they come, sequences interleaved."""
        for begin in range(0, len(sequences), MAX_BATCH):
            group = list(enumerate(sequences))[begin : begin + MAX_BATCH]
            logits = torch.cat([self.begin(sequence) for _, sequence in group])
            while True:
                chosen = self.choose(group, logits)
                for (index, sequence), token, logprob in zip(group, *chosen, strict=True):
                    yield self.accepted(index, sequence, token, logprob)
                group = [(i, s) for i, s in group if s.finish_reason is None]
                if not group:
                    break
                if can_run_ahead(self.engine, self.params):
                    yield from run_ahead(self, group)
                    break
                logits = self.step([sequence for _, sequence in group])

    def accepted(self, index: int, sequence: Sequence, token: int, logprob: float) -> TokenEvent:
        """Accept a token; a sequence that ends with it gives its memory back."""
        event = self.accept(index, sequence, token, logprob)
        self.release(sequence)
        return event

    def begin(self, sequence: Sequence) -> Tensor:
        """Logits [1, vocab] of the prompt's end, computed or taken over from the twin."""
        twin = sequence.twin
        if twin is None:
            logits = self.prefill(sequence)
            if sequence.copies_due:
                sequence.prompt_logits = logits
            return logits
        assert twin.prompt_logits is not None
        logits = twin.prompt_logits
        sequence.started = time.perf_counter()
        sequence.cache.kv.copy_from(twin.cache.kv)
        # A twin of an earlier group holds its answer too.
        sequence.cache.kv.truncate(len(sequence.prompt))
        sequence.cache.token_ids = list(sequence.prompt)
        chunks = twin.prompt_chunks
        sequence.gates, sequence.ran = twin.gates[:chunks], twin.ran[:chunks]
        sequence.prefill_s, sequence.prompt_chunks = twin.prefill_s, chunks
        twin.copies_due -= 1
        self.release(twin)
        return logits

    def release(self, sequence: Sequence) -> None:
        """Give the memory of a finished sequence back, once nobody needs it any more."""
        if sequence.finish_reason is None or sequence.copies_due:
            return
        sequence.prompt_logits = None
        if not sequence.keeps_cache:
            sequence.cache.clear()

    def prefill(self, sequence: Sequence) -> Tensor:
        """Compute the part of the prompt that the cache lacks; returns logits [1, vocab] of its end."""
        sequence.started = begin = time.perf_counter()
        kv = sequence.cache.kv
        size = self.engine.max_rows
        for start in range(kv.length, len(sequence.prompt), size):
            stop = min(start + size, len(sequence.prompt))
            ids = torch.tensor(sequence.prompt[start:stop], dtype=torch.int32, device="cpu")
            step = self.forward(ids, [stop - start], [sequence], self.routing.rows(start, stop))
            sequence.cache.token_ids = sequence.prompt[:stop]
            sequence.record(step, slice(None))
        sequence.prefill_s = time.perf_counter() - begin
        sequence.prompt_chunks = len(sequence.ran)
        return step.logits.clone()

    def step(self, sequences: list[Sequence]) -> Tensor:
        """One token of every sequence; returns logits [sequences, vocab]."""
        ids = torch.tensor([s.tokens[-1] for s in sequences], dtype=torch.int32, device="cpu")
        mask = self.step_mask(sequences)
        step = self.forward(ids, [1] * len(sequences), sequences, mask)
        for i, sequence in enumerate(sequences):
            sequence.cache.token_ids.append(sequence.tokens[-1])
            sequence.record(step, slice(i, i + 1))
        return step.logits

    def step_mask(self, sequences: list[Sequence]) -> Tensor | None:
        """Which layers the next token of each sequence is to run, where that is forced."""
        masks = [self.routing.rows(s.cache.length, s.cache.length + 1) for s in sequences]
        return None if masks[0] is None else torch.cat([m for m in masks if m is not None])

    def forward(
        self, ids: Tensor, counts: list[int], sequences: list[Sequence], mask: Tensor | None
    ) -> StepResult:
        """One engine call."""
        return self.engine.forward(
            ids,
            counts,
            [s.cache.kv for s in sequences],
            routing=self.routing.mode,
            mask=mask,
            thresholds=self.thresholds,
        )

    def choose(
        self, group: list[tuple[int, Sequence]], logits: Tensor
    ) -> tuple[list[int], list[float]]:
        """Next token of each sequence and its log-probability."""
        params = self.params
        if params.repetition_penalty != 1.0 or params.logits_processor:
            for row, (_, sequence) in enumerate(group):
                logits[row] = self.process(sequence, logits[row : row + 1])[0]
        tokens, logprobs = self.engine.sample(
            logits,
            temperature=params.effective_temperature,
            # More than the vocabulary keeps all of it, and the engine counts in 64 bits.
            top_k=min(params.top_k, self.engine.vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
            seeds=torch.tensor([s.seed for _, s in group], dtype=torch.int64, device="cpu"),
            positions=torch.tensor(
                [len(s.prompt) + len(s.tokens) for _, s in group], dtype=torch.int64, device="cpu"
            ),
        )
        if params.logprobs is not None:
            top = torch.log_softmax(logits, -1).topk(params.logprobs)
            for row, (_, sequence) in enumerate(group):
                pairs = zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)
                sequence.top_logprobs.append(list(pairs))
        for row, (_, sequence) in enumerate(group):
            if params.stopping_criteria:
                self.check_criteria(sequence, int(tokens[row]), logits[row : row + 1])
        return tokens.tolist(), logprobs.tolist()

    def process(self, sequence: Sequence, scores: Tensor) -> Tensor:
        """Repetition penalty (Keskar et al. 2019), then the caller's processors, on scores [1, vocab]."""
        penalty = self.params.repetition_penalty
        ids = torch.tensor([sequence.prompt + sequence.tokens], dtype=torch.int64, device="cpu")
        if penalty != 1.0:
            seen = torch.unique(ids)
            values = scores[0, seen]
            scores[0, seen] = torch.where(values < 0, values * penalty, values / penalty)
        for processor in self.params.logits_processor:
            scores = _checked_scores(processor, processor(ids, scores), scores)
        return scores

    def check_criteria(self, sequence: Sequence, token: int, scores: Tensor) -> None:
        """Ask the caller's stopping criteria about the sequence with its new token."""
        ids = torch.tensor(
            [[*sequence.prompt, *sequence.tokens, token]], dtype=torch.int64, device="cpu"
        )
        verdicts = [stop(ids, scores) for stop in self.params.stopping_criteria]
        # A criterion that returns nothing does not stop.
        if any(v is not None and bool(torch.as_tensor(v).all()) for v in verdicts):
            sequence.finish_reason = "stopped"

    def accept(self, index: int, sequence: Sequence, token: int, logprob: float) -> TokenEvent:
        """Add a token to its sequence and decide whether the answer is over."""
        sequence.last_token = time.perf_counter()
        if not sequence.tokens:
            sequence.first_token = sequence.last_token
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        if token in sequence.eos:
            sequence.finish_reason = "eos"
            delta = ""
        else:
            delta = sequence.stream.push(token)
            if sequence.stream.stopped:
                sequence.finish_reason = "stop"
            elif (
                len(sequence.tokens) >= self.params.max_new_tokens
                and sequence.finish_reason is None
            ):
                sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            delta += sequence.stream.finish()
        return TokenEvent(index, token, delta, logprob, sequence.finish_reason)


def _checked_scores(processor: Any, result: Any, scores: Tensor) -> Tensor:
    """What a logits processor returned, if it is scores in the shape that it was given."""
    if isinstance(result, Tensor) and result.shape == scores.shape:
        return result
    got = list(result.shape) if isinstance(result, Tensor) else repr(result)
    raise ShapeError(
        f"generate: logits_processor {getattr(processor, '__name__', processor)!r} returned {got}; wanted "
        f"scores {list(scores.shape)}; return the changed scores"
    )


def sequence_seed(seed: int, which: int) -> int:
    """Seed of the which-th answer to one prompt, as a signed 64-bit number."""
    value = (seed + which * _SEQUENCE_STRIDE) & ((1 << 64) - 1)
    return value - (1 << 64) if value >= 1 << 63 else value
