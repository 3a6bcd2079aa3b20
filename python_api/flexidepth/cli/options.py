"""Options that several commands take, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import FlexiDepthError

MODEL_HELP = "A directory, a .gguf file, a hub id (org/model), or smollm2-135m."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
PreferHub = Annotated[
    bool,
    typer.Option(
        "--prefer-hub",
        help="Fetch smollm2-135m from the Hugging Face hub (full precision), if it can be reached.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        help="Where the base model of a routing checkpoint lies; default: where it says.",
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Threads; default: those available.")
]
DType = Annotated[str, typer.Option("--dtype", help="auto (bfloat16), bfloat16 or float32.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1; auto is the CPU.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length", min=1, help="Most tokens of prompt and answer; default: the model's."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 = greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most likely tokens; 0 = off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep this much probability; 1 = off.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Drop tokens below this share of the best; 0 = off.")
]
RepetitionPenalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1 discourages repeats; 1 = off.")
]
StopStrings = Annotated[
    list[str] | None,
    typer.Option("--stop-strings", "--stop", help="Text that ends the answer; may be repeated."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of sampling; default: random.")]
ForceOption = Annotated[
    str | None,
    typer.Option(
        "--force-routing",
        help="all, none, dense; the routed layers that run (16,18,20); the share of them that each "
        "token skips, with a point (0.5); or a routing report to replay (FILE.json).",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option("--skip-threshold", help="Run a layer when its gate is above this, 0 to 1."),
]
Skip = Annotated[
    str | None,
    typer.Option(
        "--skip",
        help="A preset of a calibrated model: quality, balanced, fast; inspect lists them.",
    ),
]
TargetSkipped = Annotated[
    float | None,
    typer.Option(
        "--target-layers-skipped", help="Layers a token skips on average (calibrated models)."
    ),
]


def _check_color(value: str) -> str:
    from ..terminal import make_console

    try:
        make_console(value)
    except FlexiDepthError as error:
        raise typer.BadParameter(str(error)) from None
    return value


Color = Annotated[
    str, typer.Option("--color", callback=_check_color, help="auto, always or never.")
]
