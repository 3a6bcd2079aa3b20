"""What each part of FlexiDepth is there for: `python -m flexidepth.bench.ablations --train TEXT --prose TEXT OUT`.

Trains variants of one recipe alike, each from its own start, and evaluates them side by side: what the paper takes
away (arXiv 2503.23798, section 4.3), and other sizes of what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flexidepth.cli.common import command_errors, float_numbers, say

WHOLE = "whole"
_NO_FIT = "stages.budgets.fit_adapters=0"
# Settings of a recipe, see flexidepth.training.settings.
VARIANTS: dict[str, list[str]] = {
    WHOLE: [],
    "linear router": ["routing.ablations=[linear_router]"],
    "no adapter": ["routing.ablations=[no_adapter]", _NO_FIT],
    "no skipped KV": ["routing.ablations=[no_skipped_kv]"],
    "no skipped KV but the first": ["routing.ablations=[no_skipped_kv_but_first]"],
    "attention only": ["routing.ablations=[attention_only]", _NO_FIT],
    "feed-forward only": ["routing.ablations=[feed_forward_only]"],
    "adapter ffn/16": ["routing.adapter_reduction_factor=16"],
    "adapter ffn/4": ["routing.adapter_reduction_factor=4"],
    "adapter ffn/2": ["routing.adapter_reduction_factor=2"],
    "last 10 layers": ["routing.routing_layers=[20,21,22,23,24,25,26,27,28,29]"],
    "last 20 layers": [f"routing.routing_layers={list(range(10, 30))}"],
}


def variant_settings(name: str, tokens: int) -> list[str]:
    """Settings of a variant that trains on so many tokens; its single stage is called budgets."""
    return [*VARIANTS[name], f"stages.budgets.tokens={tokens}"]


def train_variants(
    names: Sequence[str],
    tokens: int,
    train: list[str],
    folder: Path,
    notify: Callable[[str], None],
) -> dict[str, Path]:
    """Train those that are not there yet, and go on with one that was interrupted: {name: routing checkpoint}."""
    from flexidepth.training.command import changed_recipe, find_recipe, train_recipe

    made = {}
    for name in names:
        own = folder / name.replace(" ", "-").replace("/", "-")
        notify(f"{name}: {own}")
        settings = variant_settings(name, tokens)
        recipe = changed_recipe(find_recipe("smollm2-135m-short"), train=train, settings=settings)
        made[name] = train_recipe(recipe, own, resume=own.exists(), notify=notify)
    return made


@command_errors
def main(
    output_dir: Annotated[
        Path, typer.Argument(help="Results go under eval/, the runs under runs/.")
    ],
    train: Annotated[list[str], typer.Option(help="Text to train on; may be repeated.")],
    prose: Annotated[Path | None, typer.Option(help="Held-out text.")] = None,
    code: Annotated[Path | None, typer.Option(help="Held-out code.")] = None,
    chat: Annotated[Path | None, typer.Option(help="Held-out conversations.")] = None,
    distilled: Annotated[
        Path | None, typer.Option(help="Held-out answers of the base model.")
    ] = None,
    tasks: Annotated[Path | None, typer.Option(help="Multiple-choice questions.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of a task.")] = 200,
    variants: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(VARIANTS),
    training_tokens: Annotated[int, typer.Option(min=1, help="Of each variant.")] = 61_440,
    skipped: Annotated[str, typer.Option(help="Mean layers to skip.")] = "1,2,3,4,6,8",
    tokens: Annotated[int, typer.Option(help="Most tokens of each held-out text.")] = 4096,
    answers: Annotated[int, typer.Option(help="Prompts that are answered, cut at 128 tokens.")] = 0,
) -> None:
    """Train and evaluate variants."""
    from flexidepth.evaluation.options import EvalOptions
    from flexidepth.evaluation.report import report_text
    from flexidepth.evaluation.run import evaluate

    names = [WHOLE, *(name for name in variants.split(",") if name != WHOLE)]
    if wrong := [name for name in names if name not in VARIANTS]:
        raise typer.BadParameter(
            f"--variants {', '.join(wrong)}: wanted some of {', '.join(VARIANTS)}"
        )
    texts = {"prose": prose, "code": code, "chat": chat, "distilled": distilled}
    values: dict[str, Any] = {
        "texts": {name: path for name, path in texts.items() if path is not None},
        "tasks": tasks,
        "limit": limit,
        "skipped": float_numbers(skipped, "--skipped"),
        "methods": ["flexidepth"],
        "tokens": tokens,
        "answers": answers,
        "max_new_tokens": 128,
        "per_kind": 0,
    }
    EvalOptions("before anything trains", **values)
    runs = train_variants(names, training_tokens, train, output_dir / "runs", say)
    also = {name: str(path) for name, path in runs.items() if name != WHOLE}
    options = EvalOptions(str(runs[WHOLE]), also=also, **values)
    print(report_text(evaluate(options, output_dir=output_dir / "eval", notify=say)))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
