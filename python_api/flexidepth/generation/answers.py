"""From prompts to the sequences that the decoder loop runs."""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import TYPE_CHECKING, Any

from ..arguments import seed_number
from ..config import FlexiDepthConfig
from ..errors import ValueOutOfRangeError
from .cache import PromptCache, check_cache
from .inputs import to_ids
from .loop import Sequence, sequence_seed
from .params import GenerationParams
from .text import TextStream

if TYPE_CHECKING:
    from flexidepth_ext.engine import Engine


def make_answers(
    prompts: Listed[Any],
    params: GenerationParams,
    *,
    engine: Engine,
    config: FlexiDepthConfig,
    tokenizer: Any | None,
    max_length: int,
    routing_key: str,
    cache: PromptCache | None,
    seeds: Listed[int],
) -> list[Sequence]:
    """One sequence for each answer, answers of one prompt together; nothing is computed yet.

    seeds: one for each prompt.

    Raises:
        ValueOutOfRangeError, ShapeError, UnsupportedError: a prompt, a cache or a parameter that does not
            fit the model; what the cache holds stays as it was.
    """
    params.check_vocabulary(config.vocab_size)
    count = params.num_return_sequences
    if cache is not None:
        check_cache(cache, engine, len(prompts) * count)
        max_length = min(max_length, cache.kv.max_length)
    # The last token is chosen, not computed, so it needs no place in the cache.
    more = params.max_new_tokens - 1
    listed = [to_ids(prompt, tokenizer, config.vocab_size) for prompt in prompts]
    for ids in listed:
        if len(ids) + more > max_length:
            raise ValueOutOfRangeError(
                f"generate: {len(ids)} prompt tokens + {params.max_new_tokens} new ones do not fit {max_length} "
                "positions; shorten the prompt, lower max_new_tokens or raise max_length"
            )
    stops = _end_tokens(params, config)
    answers: list[Sequence] = []
    for ids, seed in zip(listed, seeds, strict=True):
        first: Sequence | None = None
        for which in range(count):
            stream = TextStream(tokenizer, params.stop_strings, params.skip_special_tokens)
            own = cache or PromptCache(engine.new_cache(len(ids) + more), engine)
            answer = Sequence(
                ids,
                own,
                stream,
                stops,
                sequence_seed(seed, which),
                cached_tokens=own.keep_prefix(ids, routing_key),
                keeps_cache=cache is not None,
                twin=first,
                copies_due=0 if first else count - 1,
            )
            first = first or answer
            answers.append(answer)
    return answers


def prompt_seeds(seeds: Any, count: int, params: GenerationParams) -> list[int]:
    """The seed of each of `count` prompts: those given, or that of the generation for all of them.

    Raises:
        ValueOutOfRangeError: not one for each prompt, or one that is no seed.
    """
    if seeds is None:
        return [params.seed or 0] * count
    if not isinstance(seeds, Listed) or isinstance(seeds, (str, bytes)) or len(seeds) != count:
        raise ValueOutOfRangeError(
            f"generate: seeds is {seeds!r:.80}; wanted {count} of them, one for each prompt"
        )
    return [seed_number(f"generate: seeds[{i}]", seed) for i, seed in enumerate(seeds)]


def _end_tokens(params: GenerationParams, config: FlexiDepthConfig) -> frozenset[int]:
    eos = config.eos_token_id if params.eos_token_id is None else params.eos_token_id
    return frozenset([eos] if isinstance(eos, int) else (eos or ()))
