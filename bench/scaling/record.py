"""Record what the routers of a model decide: `python -m flexidepth.bench.scaling.record`.

Greedy answers to prompts of several kinds, at each preset of the dial. Takes a minute with the default model.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from flexidepth.cli.common import command_errors, say
from flexidepth.errors import ValueOutOfRangeError
from flexidepth.evaluation.data import model_digest
from flexidepth.llm import FlexiDepth

from .recorded import FILE, RecordedSequence, Recording

PROMPTS: tuple[tuple[str, str], ...] = (
    ("question", "Why is the sky blue?"),
    ("question", "What does a bank do with the money that people deposit?"),
    ("advice", "How should I prepare for a job interview?"),
    ("advice", "Give me three tips for growing tomatoes on a balcony."),
    ("story", "Tell a short story about a lighthouse keeper and a storm."),
    ("story", "Write a poem about the first snow of the year."),
    ("code", "Write a Python function that returns the largest even number of a list."),
    ("code", "Explain what this does: for i in range(10): print(i * i)"),
    ("list", "Repeat this list: apple, boat, candle, drum, feather, guitar, hammer, kettle, ladder."),
    ("list", "Name the planets of the solar system in order."),
    ("copy", "Copy this sentence three times: The train to the coast leaves at half past seven."),
    ("reckoning", "A box holds 12 eggs. How many eggs are in 7 boxes? Explain every step."),
    ("reckoning", "What is 48 plus 76? Show how you add the numbers."),
    (
        "summary",
        "Summarise: The mill by the river ground flour for two hundred years. When the railway came, flour from the "
        "city was cheaper, and the mill fell silent. Today it is a museum where children bake bread.",
    ),
    ("letter", "Write a polite letter that asks the landlord to repair the heating."),
    ("explanation", "Explain to a child how a bicycle stays upright."),
)  # fmt: skip


def record(
    llm: FlexiDepth,
    levels: Sequence[str],
    max_new_tokens: int,
    command: str,
    notify: Callable[[str], None],
    prompts: Sequence[tuple[str, str]] = PROMPTS,
) -> Recording:
    """Decisions of the prompts and of their greedy answers at each preset.

    ValueOutOfRangeError for a model whose routers are not trained: its decisions say nothing.
    """
    if not llm.routers_trained:
        raise ValueOutOfRangeError(
            f"scaling: the routers of {llm.source} are not trained; wanted a trained model"
        )
    made: dict[str, list[RecordedSequence]] = {}
    for level in levels:
        notify(f"{level}: {len(prompts)} answers of at most {max_new_tokens} tokens")
        made[level] = []
        for kind, text in prompts:
            output = llm.generate(
                [{"role": "user", "content": text}],
                skip=level,
                temperature=0.0,
                max_new_tokens=max_new_tokens,
                return_routing=True,
            )
            assert not isinstance(output, list) and output.routing is not None
            report = output.routing
            made[level].append(RecordedSequence(kind, report.prompt_length, report.ran.numpy()))
    config = llm.config
    digest, routing_layers = model_digest(llm.source), list(config.routing_layers)
    return Recording(llm.source, digest, config.num_hidden_layers, routing_layers, command, made)


@command_errors
def main(
    model: Annotated[str, typer.Argument(help="A model with trained routers.")] = "smollm2-135m",
    output: Annotated[Path, typer.Option(help="Where the decisions go.")] = Path(
        "bench/results/scaling", FILE
    ),
    levels: Annotated[str, typer.Option(help="Presets of the dial.")] = "quality,balanced,fast",
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
) -> None:
    """Record decisions."""
    command = shlex.join(["python", "-m", "flexidepth.bench.scaling.record", *sys.argv[1:]])
    with FlexiDepth.from_pretrained(model, notify=say) as llm:
        recording = record(llm, levels.split(","), max_new_tokens, command, say)
    recording = dataclasses.replace(recording, model=model)  # as it was called, not where it lies
    output.parent.mkdir(parents=True, exist_ok=True)
    recording.save(output)
    say(str(output))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
