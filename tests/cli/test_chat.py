"""flexidepth chat: lines in, answers out, the cache kept, and nothing that ends it but the user."""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexidepth import FlexiDepth
from flexidepth.cli.chat import Repl
from flexidepth.generation.chat import Chat
from flexidepth.terminal import TokenPrinter
from tests.checkpoints.tiny import save_base
from tests.cli.conftest import Command

OPTIONS = ("--max-new-tokens", 6, "--temperature", 0, "-t", 1)


@pytest.fixture
def llm(model: str) -> Iterator[FlexiDepth]:
    with FlexiDepth.from_pretrained(model, num_threads=1) as loaded:
        yield loaded


def repl_on(session: Chat) -> Repl:
    return Repl(session, TokenPrinter("never", 2, 4), interactive=False)


def test_answers_every_line_of_a_pipe(model: str, run: Command, llm: FlexiDepth) -> None:
    session = llm.chat(max_new_tokens=6, temperature=0, force_routing="all")
    wanted = [session.send("hello").text, session.send("hello hello").text]
    result = run("chat", model, *OPTIONS, text="hello\n\nhello hello\n")
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(f"{text}\n" for text in wanted)
    figures = re.findall(r"\[.* tok/s, 4\.0 of 4 layers, 6 tokens, (\d+) of (\d+)", result.stderr)
    assert len(figures) == 2
    first, second = ((int(cached), int(prompt)) for cached, prompt in figures)
    assert first == (0, 3)
    assert second[0] >= 3  # the first turn's prompt is not computed again


def test_cache_is_reused_under_a_ratio_too(model: str, run: Command) -> None:
    result = run("chat", model, *OPTIONS, "--force-routing", "0.5", text="hello\nhello\n")
    cached = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens from", result.stderr)]
    assert cached[0] == 0
    assert cached[1] >= 3


def test_commands(model: str, run: Command) -> None:
    lines = "/stats\nhello\n/stats\n/routing none\nhello\n/routing\n/reset\nhello\n/what\n/exit\nhello\n"
    result = run("chat", model, *OPTIONS, text=lines)
    assert result.exit_code == 0, result.output
    assert "no answer yet" in result.stderr
    assert re.search(r"new_tokens +6\n", result.stderr)
    assert "routing: none\n" in result.stderr
    assert "2.0 of 4 layers" in result.stderr
    assert "routing: the router decides\n" in result.stderr
    assert "conversation forgotten" in result.stderr
    assert "/what: not a command; commands: /reset" in result.stderr
    turns = re.findall(r"(\d+) of (\d+) prompt tokens", result.stderr)
    assert len(turns) == 3  # the line after /exit is not read
    assert turns[2] == ("0", "3")


@pytest.mark.parametrize("value", ["0,1", "some", "2.5", "none.json"])
def test_routing_that_does_not_fit_changes_nothing(model: str, run: Command, value: str) -> None:
    result = run("chat", model, *OPTIONS, text=f"/routing {value}\nhello\n")
    assert result.exit_code == 0
    assert "error: " in result.stderr
    assert "4.0 of 4 layers" in result.stderr


def test_system_message_comes_first(model: str, run: Command) -> None:
    result = run("chat", model, *OPTIONS, "--system", "hello", text="hello\n")
    assert "0 of 6 prompt tokens" in result.stderr


def test_a_turn_that_fails_is_not_remembered(
    llm: FlexiDepth, capsys: pytest.CaptureFixture[str]
) -> None:
    repl = repl_on(llm.chat(max_new_tokens=6, force_routing="all"))
    repl.answer("hello")
    before = list(repl.session.messages)
    repl.answer("hello " * 300)
    assert "do not fit" in capsys.readouterr().err
    assert repl.session.messages == before
    repl.answer("hello")
    assert len(repl.session.messages) == len(before) + 2


def test_ctrl_c_stops_the_answer_and_not_the_program(
    llm: FlexiDepth, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repl = repl_on(llm.chat(max_new_tokens=6, temperature=0, force_routing="all"))
    printed: list[str] = []

    def interrupt_at_third(self: TokenPrinter, text: str, used: int) -> None:
        printed.append(text)
        if len(printed) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenPrinter, "token", interrupt_at_third)
        repl.answer("hello")
    assert re.search(r"\[stopped: 2 tokens in .* s, 4\.0 layers", capsys.readouterr().err)
    assert repl.session.messages[-1]["content"] == "".join(printed)
    repl.answer("hello")
    assert "6 tokens" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_is_survived_by_a_person_only(
    llm: FlexiDepth, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[object] = [KeyboardInterrupt(), EOFError()]

    def read(_: str = "") -> str:
        raise lines.pop(0)  # type: ignore[misc]

    monkeypatch.setattr(builtins, "input", read)
    session = llm.chat()
    Repl(session, TokenPrinter("never", 2, 4), interactive=True).run()
    assert lines == []
    assert "Ctrl-D or /exit ends" in capsys.readouterr().err
    lines[:] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        repl_on(session).run()


def test_color_is_the_users_choice(model: str, run: Command) -> None:
    assert "\x1b[38;2;" in run("chat", model, *OPTIONS, "--color", "always", text="hello\n").stdout
    assert "\x1b" not in run("chat", model, *OPTIONS, "--color", "never", text="hello\n").stdout


def test_model_without_template_says_what_to_use(run: Command, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    result = run("chat", tmp_path / "base", *OPTIONS, text="hello\n")
    assert result.exit_code == 1
    assert "has no chat template; use `flexidepth generate" in result.stderr
