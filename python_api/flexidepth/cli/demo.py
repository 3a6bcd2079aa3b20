"""flexidepth demo: the main job on the default model."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import Threads, command_errors, load_model, say

_HELP = """Fetch the default model, generate with it, and measure speed against layers skipped.

Example: flexidepth demo
"""
_QUESTION = "What is the capital of France, and what is it known for?"
_SKIP_RATIO = 0.2
_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(demo)


@command_errors
def demo(
    model: Annotated[
        str, typer.Argument(help="A directory, a .gguf file, a hub id, or smollm2-135m.")
    ] = "smollm2-135m",
    question: Annotated[str, typer.Option(help="What to ask.")] = _QUESTION,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 96,
    color: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    threads: Threads = None,
) -> None:
    from ..bench.decode import measure_decode
    from ..bench.report import DEMO_COLUMNS, table
    from ..bench.timing import load_average
    from ..terminal import legend, make_console, print_token

    console = make_console(color)
    with load_model(model, device="auto", dtype="auto", threads=threads) as llm:
        config = llm.config
        most, routed = config.num_hidden_layers, config.num_routed_layers
        console.print(f"\n{model}: {most} layers, {routed} of them routed; {llm.source}")
        if not llm.routers_trained:
            console.print(
                "Its routers and adapters are seeded, not trained: below, routing is forced by a ratio, and the text "
                "suffers where layers are skipped. The speed does not depend on that."
            )
        console.print(legend(most - routed, most))
        message = [{"role": "user", "content": question}]
        for title, ratio in (
            ("every layer run", None),
            (f"{_SKIP_RATIO:.0%} of the routed layers skipped", _SKIP_RATIO),
        ):
            console.print(f"\n--- {title} ---\n> {question}", markup=False)
            force = "all" if ratio is None else ratio
            for chunk in llm.stream(
                message, max_new_tokens=max_new_tokens, temperature=0, seed=0, force_routing=force
            ):
                print_token(console, chunk.text, chunk.layers_used, most - routed, most)
                if chunk.output is not None:
                    m = chunk.output.metrics
                    console.print(
                        f"\n[{m.decode_tps:.1f} tok/s, {m.mean_layers_used:.1f} layers a token]",
                        markup=False,
                    )
        say(f"\nmeasuring (load of the machine: {load_average():.2f}) ...")
        rows = measure_decode(llm.engine, [round(r * routed) for r in _RATIOS], rounds=4, steps=16)
        console.print(table(rows, DEMO_COLUMNS), markup=False)
        console.print(
            "ideal: bytes that a dense token reads over bytes that this one reads; at batch 1 time follows bytes.",
            markup=False,
        )
