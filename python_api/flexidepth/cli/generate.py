"""flexidepth generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    Device,
    DType,
    ForceOption,
    Json,
    Model,
    Seed,
    Threads,
    Threshold,
    command_errors,
    load_model,
    parse_force_routing,
    print_json,
    say,
)

_HELP = """Generate text, tokens coloured by the layers they used.

Example: flexidepth generate smollm2-135m "The capital of France is" --max-new-tokens 32 --force-routing all
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(generate)


@command_errors
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 = off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 = off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 = off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 = off.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")
    ] = None,
    seed: Seed = None,
    use_chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Apply the chat template to the prompt.")
    ] = False,
    force_routing: ForceOption = None,
    skip_threshold: Threshold = None,
    routing_out: Annotated[
        Path | None, typer.Option(help="Write the routing report here, for `plot`.")
    ] = None,
    color: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    threads: Threads = None,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    from ..terminal import legend, make_console, print_token

    force = parse_force_routing(force_routing)
    text = sys.stdin.read() if prompt == "-" else prompt
    with load_model(model, device=device, dtype=dtype, threads=threads, quiet=as_json) as llm:
        if not llm.routers_trained and force is None:
            say(
                "note: this model's routers are seeded, not trained; --force-routing all gives the base model"
            )
        console = make_console(color)
        most = llm.config.num_hidden_layers
        fewest = most - llm.config.num_routed_layers
        arguments: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop_strings": stop or (),
            "seed": seed,
            "force_routing": force,
            "skip_threshold": skip_threshold,
            "return_routing": routing_out is not None,
        }
        out = None
        for chunk in llm.stream(
            [{"role": "user", "content": text}] if use_chat else text, **arguments
        ):
            if not as_json:
                print_token(console, chunk.text, chunk.layers_used, fewest, most)
            out = chunk.output or out
        assert out is not None
        if routing_out is not None and out.routing is not None:
            routing_out.write_text(out.routing.to_json(), encoding="utf-8")
        if as_json:
            print_json(
                {
                    "text": out.text,
                    "token_ids": out.token_ids,
                    "finish_reason": out.finish_reason,
                    "seed": out.seed,
                    "metrics": out.metrics.to_dict(),
                }
            )
            return
        console.print()
        m = out.metrics
        make_console(color, stderr=True).print(legend(fewest, most))
        say(
            f"[{m.prompt_tokens} prompt tokens at {m.prefill_tps:.0f} tok/s, {m.new_tokens} new ones at "
            f"{m.decode_tps:.1f} tok/s, {m.mean_layers_used:.1f} of {most} layers, {out.finish_reason}, seed {out.seed}]"
        )
