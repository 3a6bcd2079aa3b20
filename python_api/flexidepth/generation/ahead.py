"""The decoder loop of an engine that decodes by itself: the next step is queued before the last one is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import FlexiDepthError
from .params import GenerationParams

if TYPE_CHECKING:
    from .loop import Decoder, Sequence, TokenEvent


def can_run_ahead(engine: Any, params: GenerationParams) -> bool:
    """Whether the engine can (a CUDA engine), and nothing on the host has a say in the choice of a token."""
    host_decides = (
        params.repetition_penalty != 1.0
        or params.logits_processor
        or params.stopping_criteria
        or params.logprobs is not None
    )
    return hasattr(engine, "decode") and not host_decides


def run_ahead(decoder: Decoder, group: list[tuple[int, Sequence]]) -> Iterator[TokenEvent]:
    """Decode until every sequence of the group, which has its first token, is over."""
    while group:
        yield from _until_one_ends(decoder, group)
        group = [(i, s) for i, s in group if s.finish_reason is None]


def _until_one_ends(decoder: Decoder, group: list[tuple[int, Sequence]]) -> Iterator[TokenEvent]:
    """One run of the engine: sequences cannot leave it singly."""
    from flexidepth_ext.cuda_decode import Sampling

    params, sequences = decoder.params, [sequence for _, sequence in group]
    sampling = Sampling(
        params.effective_temperature,
        min(params.top_k, decoder.engine.vocab_size),
        params.top_p,
        params.min_p,
    )
    run = decoder.engine.decode(  # type: ignore[attr-defined]
        [s.cache.kv for s in sequences],
        [s.tokens[-1] for s in sequences],
        sampling,
        seeds=[s.seed for s in sequences],
        routing=decoder.routing.mode,
        thresholds=decoder.thresholds,
    )
    try:
        run.launch(decoder.step_mask(sequences))
        while run.in_flight:
            # Unless the step in flight gives one of them its last token.
            if all(
                s.finish_reason is None and len(s.tokens) + 1 < params.max_new_tokens
                for s in sequences
            ):
                # A step that cannot be (no memory, a recorded mask that ends) may not be needed: the token in
                # flight comes first, and where the step is needed the next run says why it cannot be.
                with suppress(FlexiDepthError):
                    run.launch(decoder.step_mask(sequences))
            step = run.collect()
            for row, (index, sequence) in enumerate(group):
                if sequence.finish_reason is not None:
                    continue  # over since the step before
                sequence.cache.token_ids.append(sequence.tokens[-1])
                sequence.record(step, slice(row, row + 1))
                event = decoder.accept(index, sequence, step.tokens[row], step.logprobs[row])
                if event.finish_reason is not None:
                    run.forget(row)
                decoder.release(sequence)
                yield event
    finally:
        run.cancel()
