"""flexidepth generate"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    command_errors,
    decode_rate,
    layer_scale,
    load_model,
    parse_force_routing,
    print_json,
    say,
    untrained,
)
from .options import (
    BaseModel,
    Color,
    Device,
    DType,
    ForceOption,
    Json,
    MaxLength,
    MinP,
    Model,
    PreferHub,
    RepetitionPenalty,
    Seed,
    Skip,
    StopStrings,
    TargetSkipped,
    Temperature,
    Threads,
    Threshold,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from ..generation.output import GenerationOutput
    from ..llm import FlexiDepth

_HELP = """Generate text, tokens coloured by the layers they used.

Standard output carries the text alone; figures go to standard error.

Example: flexidepth generate smollm2-135m "The capital of France is" --force-routing all
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(generate)


@command_errors
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--no-do-sample", help="Default: sample at a temperature above 0."
        ),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    eos_token_id: Annotated[
        list[int] | None,
        typer.Option(help="Token that ends the answer; may be repeated; default: the model's."),
    ] = None,
    stop_strings: StopStrings = None,
    seed: Seed = None,
    num_return_sequences: Annotated[int, typer.Option(help="Answers to the prompt.")] = 1,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, and those of the top n.")
    ] = None,
    use_chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Apply the chat template to the prompt.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")
    ] = True,
    force_routing: ForceOption = None,
    skip_threshold: Threshold = None,
    skip: Skip = None,
    target_layers_skipped: TargetSkipped = None,
    routing_out: Annotated[
        Path | None, typer.Option(help="Write the routing report here, for `plot` or a replay.")
    ] = None,
    color: Color = "auto",
    max_length: MaxLength = None,
    threads: Threads = None,
    dtype: DType = "auto",
    device: Device = "auto",
    prefer_hub: PreferHub = False,
    base_model: BaseModel = None,
    as_json: Json = False,
) -> None:
    if routing_out is not None and num_return_sequences > 1:
        raise typer.BadParameter("--routing-out takes one answer; leave --num-return-sequences out")
    force = parse_force_routing(force_routing)
    text = sys.stdin.read() if prompt == "-" else prompt
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "eos_token_id": eos_token_id or None,
        "stop_strings": stop_strings or (),
        "seed": seed,
        "num_return_sequences": num_return_sequences,
        "logprobs": logprobs,
        "force_routing": force,
        "skip_threshold": skip_threshold,
        "skip": skip,
        "target_layers_skipped": target_layers_skipped,
        # Without a seed sampling is random, but a ratio must not make a greedy answer so.
        "routing_seed": seed or 0,
        "return_routing": as_json or routing_out is not None,
    }
    with load_model(
        model,
        device=device,
        dtype=dtype,
        threads=threads,
        max_length=max_length,
        prefer_hub=prefer_hub,
        base_model=base_model,
    ) as llm:
        if untrained(llm) and force is None:
            say(
                "note: this model's routers are seeded, not trained; --force-routing all gives the "
                "base model"
            )
        asked: Any = [{"role": "user", "content": text}] if use_chat else text
        if as_json or num_return_sequences > 1:
            answers = llm.generate(asked, **arguments)
            outputs = answers if isinstance(answers, list) else [answers]
        else:
            outputs = [_print_answer(llm, asked, arguments, color, stream=stream)]
        if routing_out is not None and (report := outputs[0].routing) is not None:
            routing_out.write_text(report.to_json(), encoding="utf-8")
    if as_json:
        described = [_describe(out) for out in outputs]
        print_json(described if num_return_sequences > 1 else described[0])
        return
    if num_return_sequences > 1:
        print("\n---\n".join(out.text for out in outputs))
    for out in outputs:
        _say_figures(out, llm.config.num_hidden_layers)


def _print_answer(
    llm: FlexiDepth, prompt: Any, arguments: dict[str, Any], color: str, *, stream: bool
) -> GenerationOutput:
    """Print one answer token by token and return it whole."""
    from ..terminal import TokenPrinter

    printer = TokenPrinter(color, *layer_scale(llm.config))
    printer.legend()
    chunks = llm.stream(prompt, **arguments)
    out = None
    for chunk in chunks if stream else list(chunks):
        printer.token(chunk.text, chunk.layers_used)
        out = chunk.output or out
    print(flush=True)
    assert out is not None  # the last chunk of a stream has it
    return out


def _describe(out: GenerationOutput) -> dict[str, Any]:
    """An answer as plain values. layers_used: of the pass that chose each token."""
    described: dict[str, Any] = {
        "text": out.text,
        "token_ids": out.token_ids,
        "finish_reason": out.finish_reason,
        "seed": out.seed,
        "metrics": out.metrics.to_dict(),
    }
    if (report := out.routing) is not None:
        described["layers_used"] = report.layers_used[report.prompt_length - 1 :]
        described["skip_rate"] = {str(layer): rate for layer, rate in report.skip_rate.items()}
    if out.logprobs is not None:
        described["logprobs"] = out.logprobs
        described["top_logprobs"] = out.top_logprobs
    return described


def _say_figures(out: GenerationOutput, most: int) -> None:
    m = out.metrics
    say(
        f"[{m.prompt_tokens} prompt tokens at {m.prefill_tps:.0f} tok/s, {m.new_tokens} new: "
        f"{decode_rate(m)}, {m.mean_layers_used:.1f} of {most} layers, {out.finish_reason}, "
        f"seed {out.seed}]"
    )
