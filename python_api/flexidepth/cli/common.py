"""Shared by the commands: error handling, loading, the meaning of --force-routing, printing."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from ..config import FlexiDepthConfig
    from ..llm import FlexiDepth
    from ..metrics import Metrics
    from ..routing import ForceRouting

Function = TypeVar("Function", bound=Callable[..., Any])

INTERRUPTED = 130
DEBUG_VARIABLE = "FLEXIDEPTH_DEBUG"
_EXPECTED = (OSError, ImportError, ValueError, TypeError)


def float_numbers(text: str, option: str) -> list[float]:
    """Numbers out of "1,2,4"; BadParameter that names the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{option} {text!r}: wanted numbers separated by commas, as 1,2,4"
        ) from None


def say(text: str) -> None:
    """A line for the user that is not the result: to stderr."""
    print(text, file=sys.stderr, flush=True)


def command_errors(function: Function) -> Function:
    """Turn an error into one line on stderr and exit code 1, Ctrl-C into 130."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from ..errors import FlexiDepthError

        try:
            try:
                return function(*args, **kwargs)
            finally:
                # Here, where a reader that is gone is handled, and not at the interpreter's end.
                sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output is gone; keep Python from complaining about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                raise
            if isinstance(error, (FlexiDepthError, *_EXPECTED)):
                say(f"error: {describe_error(error)}")
            else:
                say(f"error: unexpected {type(error).__name__}: {error}; --debug shows where")
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


def describe_error(error: Exception) -> str:
    """The message of an error, a system's error with its file name and without its number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def load_model(
    model: str,
    *,
    device: str,
    dtype: str,
    threads: int | None,
    max_length: int | None = None,
    prefer_hub: bool = False,
    base_model: str | None = None,
) -> FlexiDepth:
    """A loaded model, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from ..llm import FlexiDepth

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"loading {Path(model).name}", total=None)
        return FlexiDepth.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            num_threads=threads,
            max_length=max_length,
            prefer_hub=prefer_hub,
            base_model=base_model,
            notify=say,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def parse_force_routing(text: str | None) -> ForceRouting:
    """What --force-routing says. A number with a point is a ratio, whole numbers are layers.

    Whether layers, ratio and report fit is for `resolve_force_routing` to say, which knows the model.
    """
    if text is None or text in ("all", "none", "dense"):
        return text
    if text.endswith(".json"):
        from ..routing import RoutingReport

        return RoutingReport.load(Path(text))
    try:
        if "." in text:
            return float(text)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--force-routing {text!r}: wanted all, none, dense, layers (16,18), a ratio (0.5) or "
            "FILE.json"
        ) from None


def layer_scale(config: FlexiDepthConfig) -> tuple[int, int]:
    """(fewest, most) layers that a token can use."""
    return config.num_hidden_layers - config.num_routed_layers, config.num_hidden_layers


def untrained(llm: FlexiDepth) -> bool:
    """Whether the model has routers and nobody has trained them."""
    return llm.config.num_routed_layers > 0 and not llm.routers_trained


def decode_rate(metrics: Metrics) -> str:
    """Decode speed as text; one token alone has no time between tokens."""
    return f"{metrics.decode_tps:.1f} tok/s" if metrics.new_tokens > 1 else "one token"


def print_json(content: Any) -> None:
    """The result on stdout, as JSON that every reader takes."""
    from ..plain_json import json_text

    print(json_text(content, indent=2))
