"""flexidepth chat"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    Device,
    DType,
    ForceOption,
    Model,
    Seed,
    Threads,
    Threshold,
    command_errors,
    load_model,
    parse_force_routing,
    say,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..generation.chat import Chat

_HELP = """Talk to a model; the conversation's cache is kept from turn to turn.

/reset forgets the conversation, /routing VALUE changes --force-routing, /stats shows the last answer's figures,
/exit or Ctrl-D ends. Ctrl-C stops an answer.

Example: flexidepth chat smollm2-135m --force-routing all
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(chat)


@command_errors
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="1 = off.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="1 = off.")] = 1.0,
    seed: Seed = None,
    force_routing: ForceOption = None,
    skip_threshold: Threshold = None,
    color: Annotated[str, typer.Option(help="auto, always or never.")] = "auto",
    threads: Threads = None,
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    from ..terminal import legend, make_console

    force = parse_force_routing(force_routing)
    with load_model(model, device=device, dtype=dtype, threads=threads) as llm:
        if not llm.routers_trained and force is None:
            say(
                "note: this model's routers are seeded, not trained: answering as the base model (/routing 0.1 skips)"
            )
            force = "all"
        session = llm.chat(
            system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            skip_threshold=skip_threshold,
            force_routing=force,
        )
        console = make_console(color)
        most = llm.config.num_hidden_layers
        make_console(color, stderr=True).print(legend(most - llm.config.num_routed_layers, most))
        _Repl(session, console).run()


class _Repl:
    """Read a line, answer it, until the end of input."""

    def __init__(self, session: Chat, console: Console) -> None:
        self.session, self.console = session, console
        self.interactive = sys.stdin.isatty()
        self.stats: dict[str, Any] = {}

    def run(self) -> None:
        if self.interactive:
            try:
                import readline  # noqa: F401  (input() uses it: history and editing)
            except ImportError:
                pass
        while True:
            try:
                line = input("> " if self.interactive else "").strip()
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.answer(line)

    def command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        if name == "/reset":
            self.session.reset()
            say("conversation forgotten")
        elif name == "/stats":
            for key, figure in self.stats.items():
                say(f"{key}: {figure:.4g}")
        elif name == "/routing":
            try:
                force = parse_force_routing(value.strip() or None)
            except typer.BadParameter as error:
                say(str(error))
                return
            self.session.arguments["force_routing"] = force
            say(f"routing: {value.strip() or 'the router decides'}")
        else:
            say("commands: /reset, /routing VALUE, /stats, /exit")

    def answer(self, line: str) -> None:
        from flexidepth_ext.errors import FlexiDepthError

        from ..terminal import print_token

        config = self.session.llm.config
        most = config.num_hidden_layers
        stream = self.session.stream(line)
        out = None
        try:
            for chunk in stream:
                print_token(
                    self.console,
                    chunk.text,
                    chunk.layers_used,
                    most - config.num_routed_layers,
                    most,
                )
                out = chunk.output or out
        except KeyboardInterrupt:
            say(" [stopped]")
        except FlexiDepthError as error:
            say(f"error: {error}")
        finally:
            stream.close()  # type: ignore[attr-defined]
        self.console.print()
        if out is not None:
            self.stats = out.metrics.to_dict()
            m = out.metrics
            say(
                f"[{m.decode_tps:.1f} tok/s, {m.mean_layers_used:.1f} of {most} layers, {m.new_tokens} tokens, "
                f"{m.cached_tokens} of {m.prompt_tokens} prompt tokens from the cache]"
            )
