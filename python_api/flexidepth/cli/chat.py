"""flexidepth chat"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import (
    command_errors,
    decode_rate,
    layer_scale,
    load_model,
    parse_force_routing,
    say,
    untrained,
)
from .options import (
    BaseModel,
    Color,
    Device,
    DType,
    ForceOption,
    MaxLength,
    MinP,
    Model,
    PreferHub,
    RepetitionPenalty,
    Seed,
    Skip,
    StopStrings,
    TargetSkipped,
    Threads,
    Threshold,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from ..generation.chat import Chat
    from ..generation.output import GenerationOutput
    from ..terminal import TokenPrinter

_HELP = """Talk to a model; the conversation's cache is kept from turn to turn.

/reset forgets the conversation, /routing VALUE changes --force-routing (no value: the router
decides), /stats shows the last answer's figures, /exit or Ctrl-D ends. Ctrl-C stops an answer.

Example: flexidepth chat smollm2-135m --force-routing all
"""
_COMMANDS = "commands: /reset, /routing VALUE, /stats, /exit"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(help=_HELP)(chat)


@command_errors
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = greedy.")] = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.9,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop_strings: StopStrings = None,
    seed: Seed = None,
    force_routing: ForceOption = None,
    skip_threshold: Threshold = None,
    skip: Skip = None,
    target_layers_skipped: TargetSkipped = None,
    color: Color = "auto",
    max_length: MaxLength = None,
    threads: Threads = None,
    dtype: DType = "auto",
    device: Device = "auto",
    prefer_hub: PreferHub = False,
    base_model: BaseModel = None,
) -> None:
    from ..errors import UnsupportedError
    from ..generation.skipping import resolve_thresholds
    from ..routing import resolve_force_routing
    from ..terminal import TokenPrinter

    force = parse_force_routing(force_routing)
    with load_model(
        model,
        device=device,
        dtype=dtype,
        threads=threads,
        max_length=max_length,
        prefer_hub=prefer_hub,
        base_model=base_model,
    ) as llm:
        # A wrong value is said before the first question.
        resolve_force_routing(force, llm.config)
        resolve_thresholds(llm.config, skip_threshold, skip, target_layers_skipped)
        if getattr(llm.tokenizer, "chat_template", None) is None:
            raise UnsupportedError(
                f"chat: {model} has no chat template; use `flexidepth generate {model} PROMPT`"
            )
        if untrained(llm) and force is None:
            say(
                "note: this model's routers are seeded, not trained: it answers as the base model "
                "(/routing 0.2 skips layers)"
            )
            force = "all"
        session = llm.chat(
            system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_strings=stop_strings or (),
            seed=seed,
            skip_threshold=skip_threshold,
            skip=skip,
            target_layers_skipped=target_layers_skipped,
            force_routing=force,
            # The same in every turn: keys and values computed under another draw are not reused.
            routing_seed=seed or 0,
        )
        printer = TokenPrinter(color, *layer_scale(llm.config))
        printer.legend()
        Repl(session, printer, interactive=sys.stdin.isatty()).run()


class Repl:
    """Reads a line and answers it, until the end of input.

    Args:
        session: the conversation.
        printer: where answers go.
        interactive: whether a person types: show a prompt, survive Ctrl-C while waiting for a line.
    """

    def __init__(self, session: Chat, printer: TokenPrinter, *, interactive: bool) -> None:
        self.session, self.printer, self.interactive = session, printer, interactive
        self.last: GenerationOutput | None = None

    def run(self) -> None:
        """Until Ctrl-D, /exit or the end of a pipe."""
        if self.interactive:
            with suppress(ImportError):  # not on every system; input() uses it for editing
                import readline  # noqa: F401
            say(_COMMANDS)
        while True:
            try:
                if not self.turn():
                    return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                say("\n(Ctrl-D or /exit ends)")

    def turn(self) -> bool:
        """Read a line and do what it asks; False when the conversation is over."""
        try:
            line = input("> " if self.interactive else "").strip()
        except EOFError:
            if self.interactive:
                say("")
            return False
        if line in ("/exit", "/quit"):
            return False
        if line.startswith("/"):
            self.command(line)
        elif line:
            self.answer(line)
        return True

    def command(self, line: str) -> None:
        """Obey a line that starts with a slash."""
        name, _, value = line.partition(" ")
        if name == "/reset":
            self.session.reset()
            say("conversation forgotten")
        elif name == "/stats":
            self.stats()
        elif name == "/routing":
            self.routing(value.strip())
        else:
            say(f"{name}: not a command; {_COMMANDS}")

    def stats(self) -> None:
        """The last answer's figures."""
        if self.last is None:
            say("no answer yet")
            return
        for key, figure in self.last.metrics.to_dict().items():
            say(f"{key:18} {figure:.4g}" if isinstance(figure, float) else f"{key:18} {figure}")

    def routing(self, value: str) -> None:
        """Change the routing of the answers to come."""
        from ..errors import FlexiDepthError
        from ..routing import resolve_force_routing

        try:
            force = parse_force_routing(value or None)
            resolve_force_routing(force, self.session.llm.config)
        except (FlexiDepthError, OSError, typer.BadParameter) as error:
            say(f"error: {error}")
            return
        self.session.arguments["force_routing"] = force
        say(f"routing: {value or 'the router decides'}")

    def answer(self, line: str) -> None:
        """Stream one answer, then say how fast it came."""
        from ..errors import FlexiDepthError

        before = list(self.session.messages)
        stream = self.session.stream(line)
        out, used = None, []
        begin = time.perf_counter()
        try:
            for chunk in stream:
                self.printer.token(chunk.text, chunk.layers_used)
                used.append(chunk.layers_used)
                out = chunk.output or out
        except KeyboardInterrupt:
            seconds = time.perf_counter() - begin
            print(flush=True)
            mean = f"{sum(used) / len(used):.1f} layers a token" if used else "no token yet"
            say(f"[stopped: {len(used)} tokens in {seconds:.1f} s, {mean}]")
        except FlexiDepthError as error:
            # A turn that failed is not part of the conversation.
            self.session.messages = before
            say(f"error: {error}")
        else:
            print(flush=True)
            if out is not None:
                self.last = out
                say(_figures(out, self.session.llm.config.num_hidden_layers))
        finally:
            stream.close()  # type: ignore[attr-defined]


def _figures(out: Any, most: int) -> str:
    m = out.metrics
    return (
        f"[{decode_rate(m)}, {m.mean_layers_used:.1f} of {most} layers, {m.new_tokens} tokens, "
        f"{m.cached_tokens} of {m.prompt_tokens} prompt tokens from the cache]"
    )
