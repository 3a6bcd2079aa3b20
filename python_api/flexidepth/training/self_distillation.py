"""Self-distillation: the base model's own answers to prompts, as conversations to train routers on.

No public instruction data says things the way the frozen model says them. Its own answers do, so on them the
routed model has nothing to learn but when it may skip.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..arguments import as_number, seed_number, whole_number
from ..errors import SaveError, ValueOutOfRangeError
from ..generation.inputs import to_ids
from ..generation.loop import MAX_BATCH
from .prompts import Prompt
from .writing import json_line, last_whole_line, open_to_append

if TYPE_CHECKING:
    from ..generation.output import GenerationOutput
    from ..llm import FlexiDepth

# Called with (answers done, answers in all, tokens sampled by this call).
DistillProgress = Callable[[int, int, int], None]

_BEGINNING = b'{"messages": '  # of every line
_FORMAT = 2  # raised when the same options begin to give other answers


@dataclass(frozen=True)
class DistillOptions:
    """How answers are sampled.

    keep_unfinished: keep answers that reached max_new_tokens without an end (finish_reason "length" in their meta).
    A chat template puts an end behind them all the same, where the model would have gone on.
    """

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    samples_per_prompt: int = 1
    seed: int = 0
    keep_unfinished: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples_per_prompt"):
            whole_number(f"distill: {name}", getattr(self, name), 1)
        seed_number("distill: seed", self.seed)
        temperature, top_p = as_number(self.temperature), as_number(self.top_p)
        if temperature is None or not 0 <= temperature < float("inf"):
            raise ValueOutOfRangeError(
                f"distill: temperature is {self.temperature!r}; wanted 0 (greedy) or more"
            )
        if temperature == 0 and self.samples_per_prompt > 1:
            raise ValueOutOfRangeError(
                f"distill: {self.samples_per_prompt} samples a prompt at temperature 0 would be the same; "
                "give a temperature above 0"
            )
        if top_p is None or not 0 < top_p <= 1:
            raise ValueOutOfRangeError(
                f"distill: top_p is {self.top_p!r}; wanted a value in (0, 1]"
            )

    def seed_of(self, prompt: int, sample: int) -> int:
        """Of an answer: the same whatever else is sampled, and unlike that of any other answer."""
        digest = hashlib.sha256(f"{self.seed} {prompt} {sample}".encode()).digest()
        return int.from_bytes(digest[:7], "big")


@dataclass
class DistillReport:
    """What this call did. resumed: answers that were done before; written, unfinished (not kept), empty (not
    kept), too_long (prompts that leave no room for an answer): answers; tokens: sampled."""

    resumed: int = 0
    written: int = 0
    unfinished: int = 0
    empty: int = 0
    too_long: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        parts = [f"{self.written} answers written, {self.tokens} tokens"]
        notes = {
            "answered before": self.resumed,
            "without an end dropped": self.unfinished,
            "empty ones dropped": self.empty,
            "prompts too long": self.too_long,
        }
        return ", ".join(parts + [f"{count} {note}" for note, count in notes.items() if count])


def distill(
    llm: FlexiDepth,
    prompts: Sequence[Prompt],
    out: Path,
    options: DistillOptions,
    *,
    batch_size: int = MAX_BATCH,
    overwrite: bool = False,
    progress: DistillProgress | None = None,
) -> DistillReport:
    """Append the base model's answers to `out`, one conversation a line, in the order of the prompts.

    Every routed layer runs at weight 1, so the answers are exactly the base model's. A run that was interrupted
    goes on behind its last whole line; the file ends up the same, byte for byte, as without the interruption.

    Args:
        out: lines {"messages": [...], "meta": {"prompt", "sample", "seed", "finish_reason", "new_tokens", "run"}}.
        batch_size: answers sampled together, 1 to 8; they do not depend on it.
        overwrite: begin anew instead of going on.
        progress: called after each token.

    Raises:
        SaveError: `out` is something else, or of another model, other options or other prompts; or it cannot be
            written. ValueOutOfRangeError: an option out of range. UnsupportedError: a tokenizer without a chat
            template.
    """
    batch_size = whole_number("distill: batch_size", batch_size, 1, MAX_BATCH)
    jobs = [(p, s) for p in range(len(prompts)) for s in range(options.samples_per_prompt)]
    run = _run_name(llm, options)
    report = DistillReport()
    try:
        if overwrite:
            out.unlink(missing_ok=True)
        report.resumed = _jobs_done(out, run, prompts, options)
        with open_to_append(out) as file:
            _answer(llm, prompts, jobs, file, run, options, batch_size, report, progress)
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"{out}: cannot be written: {error.strerror}") from error
    return report


def _answer(
    llm: FlexiDepth,
    prompts: Sequence[Prompt],
    jobs: list[tuple[int, int]],
    file: IO[str],
    run: str,
    options: DistillOptions,
    batch_size: int,
    report: DistillReport,
    progress: DistillProgress | None,
) -> None:
    done = report.resumed
    waiting = iter(jobs[done:])
    while batch := list(islice(waiting, batch_size)):
        fitting = []
        for prompt, sample in batch:
            messages = [dict(message) for message in prompts[prompt].messages]
            ids = to_ids(messages, llm.tokenizer, llm.config.vocab_size)
            if len(ids) + options.max_new_tokens - 1 <= llm.max_length:
                fitting.append((prompt, sample, messages, ids))
            else:
                report.too_long += 1
        ended = done + len(batch) - len(fitting)

        def on_token(event: Any) -> None:
            nonlocal ended
            report.tokens += 1
            ended += event.finish_reason is not None
            if progress is not None:
                progress(ended, len(jobs), report.tokens)

        answers = _sample(llm, [f[3] for f in fitting], [f[:2] for f in fitting], options, on_token)
        for (prompt, sample, messages, _), answer in zip(fitting, answers, strict=True):
            if answer.finish_reason == "length" and not options.keep_unfinished:
                report.unfinished += 1
            elif not answer.text.strip():
                report.empty += 1
            else:
                report.written += 1
                file.write(json_line(_record(messages, answer, prompt, sample, run)))
        file.flush()
        done += len(batch)
        if progress is not None:
            progress(done, len(jobs), report.tokens)


def _sample(
    llm: FlexiDepth,
    ids: list[list[int]],
    jobs: list[tuple[int, int]],
    options: DistillOptions,
    on_token: Callable[[Any], None],
) -> list[GenerationOutput]:
    if not ids:
        return []
    answers = llm.generate(
        ids,
        seeds=[options.seed_of(prompt, sample) for prompt, sample in jobs],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        force_routing="all",
        on_token=on_token,
    )
    assert isinstance(answers, list)  # for a list of prompts
    return answers


def _record(
    messages: list[dict[str, str]], answer: GenerationOutput, prompt: int, sample: int, run: str
) -> dict[str, Any]:
    return {
        "messages": [*messages, {"role": "assistant", "content": answer.text}],
        "meta": {
            "prompt": prompt,
            "sample": sample,
            "seed": answer.seed,
            "finish_reason": answer.finish_reason,
            "new_tokens": len(answer.token_ids),
            "run": run,
        },
    }


def _run_name(llm: FlexiDepth, options: DistillOptions) -> str:
    """Of everything but the prompts that decides what the answers are."""
    dtype = str(getattr(llm.engine, "dtype", ""))
    content = [_FORMAT, Path(llm.source).name, dtype, sorted(asdict(options).items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def _jobs_done(out: Path, run: str, prompts: Sequence[Prompt], options: DistillOptions) -> int:
    """How many answers the file already speaks for: up to and with that of its last whole line.

    Answers behind that one that were dropped are sampled and dropped again.
    """
    if not out.exists() or out.stat().st_size == 0:
        return 0
    line = last_whole_line(out)
    other = f"{out}: holds something else; choose another name, or --overwrite to replace it"
    if line is None:
        with out.open("rb") as file:
            if _BEGINNING.startswith(file.read(len(_BEGINNING))):
                return 0  # interrupted within its first line
        raise SaveError(other)
    try:
        record = json.loads(line)
        meta, asked = record["meta"], record["messages"][:-1]
        prompt, sample, its_run = int(meta["prompt"]), int(meta["sample"]), meta["run"]
    except (ValueError, TypeError, KeyError) as error:
        raise SaveError(other) from error
    if its_run != run:
        raise SaveError(
            f"{out}: holds answers of another model or of other options; repeat the run with those, choose "
            "another name, or --overwrite to begin anew"
        )
    if prompt >= len(prompts) or asked != [dict(m) for m in prompts[prompt].messages]:
        raise SaveError(
            f"{out}: its last answer is to prompt {prompt}, which is another one now, or none; give the prompts "
            "of before, choose another name, or --overwrite to begin anew"
        )
    return prompt * options.samples_per_prompt + sample + 1
