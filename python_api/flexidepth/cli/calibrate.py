"""flexidepth calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import command_errors, float_numbers, load_model, say
from .options import BaseModel, DType, PreferHub, Threads

if TYPE_CHECKING:
    from ..training.calibration import Calibration

_HELP = """Measure which thresholds skip how many layers, and keep them in the checkpoint.

Afterwards generate and chat take --skip balanced or --target-layers-skipped 3.5 for this model. The text should
be none that the routers were trained on; of conversations the answers are counted. What happens where nothing is
asked for changes with --default alone.

Example: flexidepth calibrate my-routing --data held-out.jsonl
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(calibrate)


@command_errors
def calibrate(
    model: Annotated[
        Path, typer.Argument(help="A FlexiDepth directory, whole or of routers alone.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            help='Held-out text: .txt, or .jsonl with "text" or "messages" a line; may be repeated, each '
            "gives as much."
        ),
    ],
    targets: Annotated[
        str | None,
        typer.Option(
            help="Mean layers skipped a token, as 1,2,4; default: 0.5,1,2,3,4,5,6,8 as far as there "
            "are routed layers."
        ),
    ] = None,
    default: Annotated[
        str | None,
        typer.Option(
            help="A preset (quality, balanced, fast), which from now on holds where nothing is asked for."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of text to measure on.")] = 8192,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of one sequence.")] = 1024,
    base_model: BaseModel = None,
    threads: Threads = None,
    dtype: DType = "auto",
    prefer_hub: PreferHub = False,
) -> None:
    from ..checkpoints.config_file import check_changeable, update_config
    from ..dial import calibrated_thresholds, preset_target
    from ..training import calibration
    from ..training.calibration_text import token_sequences
    from ..training.documents import read_documents

    wanted = None if targets is None else float_numbers(targets, "--targets")
    check_changeable(model)
    # Before the model: a wrong file is said at once.
    documents = [list(read_documents([path])) for path in data]
    share = -(-tokens // len(data))
    with load_model(
        str(model),
        device="auto",
        dtype=dtype,
        threads=threads,
        prefer_hub=prefer_hub,
        base_model=base_model,
    ) as llm:
        length = min(length, llm.max_length)
        texts = [
            sequence
            for own in documents
            for sequence in token_sequences(own, llm.tokenizer, tokens=share, length=length)
        ]
        found = calibration.calibrate(
            llm,
            [text.ids for text in texts],
            wanted,
            counted=[text.counted for text in texts],
            on_run=lambda offset, skipped: say(f"offset {offset:+.4f}: {skipped:.3f} layers"),
        )
        fields = found.config_fields(llm.config.skip_presets)
        if default is not None:
            points = fields["calibration"]
            target = preset_target(points, fields["skip_presets"], default)
            fields["router_thresholds"] = calibrated_thresholds(points, target)
    update_config(model, fields)
    print(_table(found))
    presets = ", ".join(f"{name} {target:g}" for name, target in fields["skip_presets"].items())
    say(f"measured on {found.tokens} tokens in {found.runs} runs; presets: {presets or 'none'}")
    if default is None:
        say(
            f"where nothing is asked for {found.unasked:.2f} layers are skipped, as before; --default quality changes "
            "that"
        )
    else:
        say(f"where nothing is asked for: {default}")


def _table(found: Calibration) -> str:
    rows = ["layers wanted     got  threshold"]
    for point in found.points:
        low, high = min(point.thresholds), max(point.thresholds)
        tau = f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"
        rows.append(f"{point.wanted:13.2f} {point.layers_skipped:7.3f}  {tau}")
    return "\n".join(rows)
