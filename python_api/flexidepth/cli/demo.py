"""flexidepth demo: the main job on the default model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import command_errors, decode_rate, layer_scale, load_model, say, untrained
from .options import MODEL_HELP, Color, PreferHub, Threads

if TYPE_CHECKING:
    from ..llm import FlexiDepth
    from ..terminal import TokenPrinter

_HELP = """Fetch the default model, answer with it, and measure speed against layers skipped.

Example: flexidepth demo
"""
_QUESTION = "What is the capital of France, and what is it known for?"
_SKIP_RATIO = 0.2  # of the routed layers: enough to see colours and what skipping does to the text
_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CONTEXT, _ROUNDS, _STEPS = 128, 8, 80
_UNTRAINED = """\
Its routers and adapters are seeded, not trained: nothing here has learnt which layers a token can
do without. So the routing is forced, and where layers are skipped the text gets worse. The speed
is real all the same: it depends on how many layers run, not on which."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(demo)


@command_errors
def demo(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "smollm2-135m",
    question: Annotated[str, typer.Option(help="What to ask.")] = _QUESTION,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 96,
    color: Color = "auto",
    threads: Threads = None,
    prefer_hub: PreferHub = False,
) -> None:
    from ..terminal import TokenPrinter

    with load_model(
        model, device="auto", dtype="auto", threads=threads, prefer_hub=prefer_hub
    ) as llm:
        config = llm.config
        printer = TokenPrinter(color, *layer_scale(config))
        print(f"{model}, kept in {llm.base_source}")
        if llm.source != llm.base_source:
            print(f"trained routers and adapters: {llm.source}")
        print(f"{config.num_hidden_layers} layers, {config.num_routed_layers} of them routed")
        if untrained(llm):
            print(_UNTRAINED)
        printer.legend()
        for title, routing in _ways(llm):
            _answer(llm, printer, question, max_new_tokens, title, routing)
        _measure(llm)


def _ways(llm: FlexiDepth) -> list[tuple[str, dict[str, Any]]]:
    """What the answers are made with: every layer, then what the routers or, untrained, a ratio leave."""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("every layer run: the base model's own answer", {"force_routing": "all"})
    ]
    presets = llm.config.skip_presets
    if presets:
        for name, skipped in sorted(presets.items(), key=lambda item: item[1]):
            title = f"the routers decide, {name}: about {skipped:g} layers skipped a token"
            ways.append((title, {"skip": name}))
    elif untrained(llm):
        title = f"{_SKIP_RATIO:.0%} of the routed layers skipped"
        ways.append((title, {"force_routing": _SKIP_RATIO}))
    else:
        ways.append(("the routers decide", {}))
    return ways


def _answer(
    llm: FlexiDepth,
    printer: TokenPrinter,
    question: str,
    max_new_tokens: int,
    title: str,
    routing: dict[str, Any],
) -> None:
    """Stream one answer, coloured, with its speed below."""
    print(f"\n--- {title} ---\n> {question}", flush=True)
    # A base model has no template: it continues the text instead of answering.
    chats = getattr(llm.tokenizer, "chat_template", None) is not None
    prompt = [{"role": "user", "content": question}] if chats else question
    for chunk in llm.stream(
        prompt, max_new_tokens=max_new_tokens, temperature=0, seed=0, **routing
    ):
        printer.token(chunk.text, chunk.layers_used)
        if chunk.output is not None:
            m = chunk.output.metrics
            most = llm.config.num_hidden_layers
            print(f"\n[{decode_rate(m)}, {m.mean_layers_used:.1f} of {most} layers a token]")


def _measure(llm: FlexiDepth) -> None:
    """The table: decode speed at five skip ratios beside the ideal, every case in turn."""
    from ..bench.decode import measure_decode
    from ..bench.load import load_average
    from ..bench.plans import make_plans
    from ..bench.report import DEMO_COLUMNS, table

    routed = llm.config.num_routed_layers
    skips = [round(ratio * routed) for ratio in _RATIOS] if routed else []
    say(f"\nmeasuring; load of the machine: {load_average():.2f} ...")
    plans = make_plans("random", skips, llm.config)
    dense, *rows = measure_decode(llm.engine, plans, depth=_CONTEXT, rounds=_ROUNDS, steps=_STEPS)
    named = [replace(dense, name="none (dense: routers not evaluated)")]
    for ratio, skipped, row in zip(_RATIOS, skips, rows, strict=False):
        named.append(replace(row, name=f"{skipped} of {routed} routed ({ratio:.0%})"))
    count = llm.engine.num_threads
    threads = f"{count} thread" + ("s" if count > 1 else "")
    print(f"\ndecode, bfloat16, batch 1, {_CONTEXT} tokens in the cache, {threads}, median")
    print(table(named, DEMO_COLUMNS))
    print("ideal: bytes that a dense token reads over bytes that this one reads")
    print(
        "by reads: the times in which so many bytes are merely read; caches hold a larger part of fewer bytes"
    )
