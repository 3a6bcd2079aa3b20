"""Shared by the commands: error handling, model options, printing to stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from ..llm import FlexiDepth
    from ..routing import ForceRouting

Function = TypeVar("Function", bound=Callable[..., Any])

Model = Annotated[
    str, typer.Argument(help="A directory, a .gguf file, a hub id (org/model), or smollm2-135m.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Threads; default: those available.")
]
DType = Annotated[str, typer.Option("--dtype", help="auto (bfloat16), bfloat16 or float32.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of sampling; default: random.")]
ForceOption = Annotated[
    str | None,
    typer.Option(
        "--force-routing",
        help="all, none, dense, layers that run (16,18,20), a skip ratio (0.5), or a routing report (FILE.json).",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option("--skip-threshold", help="Run a layer when its gate is above this, 0 to 1."),
]
INTERRUPTED = 130


def say(text: str) -> None:
    """A line for the user that is not the result: to stderr."""
    print(text, file=sys.stderr, flush=True)


def command_errors(function: Function) -> Function:
    """Turn expected errors into one line on stderr and exit code 1, Ctrl-C into 130."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from flexidepth_ext.errors import FlexiDepthError

        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output is gone; keep Python from complaining about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (FlexiDepthError, OSError, ImportError, ValueError, TypeError) as error:
            if os.environ.get("FLEXIDEPTH_DEBUG"):
                raise
            say(f"error: {error}")
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


def load_model(
    model: str, *, device: str, dtype: str, threads: int | None, quiet: bool = False
) -> FlexiDepth:
    """A loaded model, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from ..llm import FlexiDepth

    notify = (lambda _: None) if quiet else say
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        return FlexiDepth.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            num_threads=threads,
            notify=notify,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def parse_force_routing(text: str | None) -> ForceRouting:
    """What --force-routing means; errors about values come from the model, which knows its layers."""
    if text is None or text in ("all", "none", "dense"):
        return text
    if text.endswith(".json"):
        from ..routing import RoutingReport

        return RoutingReport.load(Path(text)).mask()
    try:
        if "," not in text and ("." in text or float(text) in (0, 1)):
            return float(text)
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(
            f"--force-routing {text!r}: wanted all, none, dense, layers (16,18), a ratio (0.5) or FILE.json"
        ) from None


def print_json(content: Any) -> None:
    """The result on stdout."""
    print(json.dumps(content, ensure_ascii=False, indent=2))
