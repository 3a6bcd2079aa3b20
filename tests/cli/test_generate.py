"""flexidepth generate: the same text as the API, on standard output alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexidepth import FlexiDepth, RoutingReport
from tests.cli.conftest import Command

ESCAPE = "\x1b["
COLORS = re.compile(r"\x1b\[[0-9;]*m")
ARGUMENTS = ("--max-new-tokens", 12, "-t", 1)


def described(run: Command, *arguments: object) -> Any:
    result = run("generate", *arguments, *ARGUMENTS, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_standard_output_is_the_text_alone(model: str, run: Command, how: str) -> None:
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        wanted = llm.generate("hello hello", max_new_tokens=12, force_routing="all")
    result = run("generate", model, "hello hello", "--force-routing", "all", how, *ARGUMENTS)
    assert result.exit_code == 0, result.output
    assert result.stdout == wanted.text + "\n"
    assert "2 prompt tokens" in result.stderr
    assert "tok/s" in result.stderr
    assert "4.0 of 4 layers" in result.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 9.0),
        ("do_sample", False),
        ("top_k", 1),
        ("top_p", 0.01),
        ("min_p", 1.0),
        ("repetition_penalty", 3.0),
        ("seed", 8),
        ("max_new_tokens", 3),
        ("force_routing", "none"),
        ("skip_threshold", 1.0),
    ],
)
def test_each_argument_reaches_the_model(
    model: str, run: Command, name: str, value: object
) -> None:
    usual = {"max_new_tokens": 12, "temperature": 1.5, "seed": 7, "eos_token_id": 319}
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        without = llm.generate("hello hello", **usual).token_ids
        wanted = llm.generate("hello hello", **{**usual, name: value}).token_ids
    assert wanted != without
    options: list[object] = []
    for key, given in {**usual, name: value}.items():
        flag = key.replace("_", "-")
        options += [f"--no-{flag}"] if given is False else [f"--{flag}", given]
    result = run("generate", model, "hello hello", "-t", 1, "--json", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["token_ids"] == wanted


def test_json_tells_layers_and_log_probabilities(model: str, run: Command) -> None:
    with FlexiDepth.from_pretrained(model, num_threads=1) as llm:
        options: dict[str, Any] = {"max_new_tokens": 12, "force_routing": [2], "logprobs": 2}
        wanted = llm.generate("hello hello", **options)
    got = described(run, model, "hello hello", "--force-routing", "2", "--logprobs", 2)
    assert got["text"] == wanted.text
    assert got["logprobs"] == pytest.approx(wanted.logprobs)
    assert [len(row) for row in got["top_logprobs"]] == [2] * 12
    assert got["layers_used"] == [3] * 12
    assert got["skip_rate"] == {"2": 0.0, "3": 1.0}
    assert got["metrics"]["new_tokens"] == 12


def test_stop_strings_and_end_tokens_end_the_answer(model: str, run: Command) -> None:
    free = described(run, model, "hello", "--force-routing", "all")
    third = free["token_ids"][2]
    ended = described(run, model, "hello", "--force-routing", "all", "--eos-token-id", third)
    first = free["token_ids"].index(third) + 1
    assert ended["token_ids"] == free["token_ids"][:first]
    assert ended["finish_reason"] == "eos"
    piece = next(c for c in free["text"] if c.isascii() and c.isprintable())
    stopped = described(run, model, "hello", "--force-routing", "all", "--stop", piece)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == free["text"][: free["text"].index(piece)]


def test_several_answers(model: str, run: Command) -> None:
    options = ("--num-return-sequences", 2, "--temperature", 1.5, "--seed", 3)
    answers = described(run, model, "hello", *options)
    assert len(answers) == 2
    assert answers[0]["token_ids"] != answers[1]["token_ids"]
    result = run("generate", model, "hello", *options, *ARGUMENTS)
    assert result.stdout == "\n---\n".join(a["text"] for a in answers) + "\n"


def test_prompt_from_standard_input(model: str, run: Command) -> None:
    typed = run("generate", model, "hello hello", *ARGUMENTS)
    piped = run("generate", model, "-", *ARGUMENTS, text="hello hello")
    assert piped.exit_code == 0
    assert piped.stdout == typed.stdout


def test_chat_applies_the_template(model: str, run: Command) -> None:
    raw = described(run, model, "hello")["metrics"]["prompt_tokens"]
    chat = described(run, model, "hello", "--chat")["metrics"]["prompt_tokens"]
    assert chat == raw + 2  # <|im_start|> and <|im_end|>


def test_greedy_with_a_ratio_is_the_same_every_time(model: str, run: Command) -> None:
    call = ("generate", model, "hello", "--force-routing", "0.5", *ARGUMENTS)
    assert run(*call).stdout == run(*call).stdout


def test_seeded_routers_are_said(model: str, run: Command) -> None:
    assert "seeded, not trained" in run("generate", model, "hello", *ARGUMENTS).stderr
    forced = run("generate", model, "hello", "--force-routing", "all", *ARGUMENTS)
    assert "seeded" not in forced.stderr


def test_colors_follow_option_variable_and_terminal(
    model: str, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ("generate", model, "hello", "--force-routing", "0.5", *ARGUMENTS)
    plain = run(*call)
    assert plain.exit_code == 0, plain.stderr
    assert ESCAPE not in plain.stdout + plain.stderr
    monkeypatch.setenv("FORCE_COLOR", "1")  # stands in for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert ESCAPE in run(*call).stdout
    assert ESCAPE not in run(*call, "--color", "never").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert ESCAPE not in run(*call).stdout
    always = run(*call, "--color", "always")
    assert ESCAPE in always.stdout
    assert COLORS.sub("", always.stdout) == plain.stdout
    assert "layers used:  2  3  4 " in COLORS.sub("", always.stderr)


def test_unknown_color_is_wrong_usage(model: str, run: Command) -> None:
    result = run("generate", model, "hello", "--color", "sometimes")
    assert result.exit_code == 2
    assert "auto, always, never" in result.stderr


def test_routing_report_is_written_and_replayed(
    model: str, run: Command, report: Path, tmp_path: Path
) -> None:
    written = RoutingReport.load(report)
    assert written.ran.sum(1).tolist() == [1] * len(written.tokens)
    again = tmp_path / "again.json"
    options = ("--force-routing", report, "--routing-out", again)
    result = run("generate", model, "hello hello", *options, *ARGUMENTS)
    assert result.exit_code == 0, result.output
    replayed = RoutingReport.load(again)
    assert replayed.mode == written.mode == "forced_hard"
    assert replayed.ran.tolist() == written.ran.tolist()


def test_report_of_another_model_is_refused(model: str, run: Command, report: Path) -> None:
    content = json.loads(report.read_text(encoding="utf-8"))
    report.write_text(json.dumps({**content, "routing_layers": [1, 3]}), encoding="utf-8")
    result = run("generate", model, "hello", "--force-routing", report, *ARGUMENTS)
    assert result.exit_code == 1
    assert "[1, 3]" in result.stderr
    assert "[2, 3]" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--force-routing", "0,2"), "layers [0] are not routed; this model routes [2, 3]"),
        (("--force-routing", "1.5"), "skip ratio is 1.5"),
        (("--force-routing", "none.json"), "none.json: No such file"),
        (("--skip-threshold", "2"), "2.0"),
        (("--top-p", "0"), "top_p is 0.0"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--max-new-tokens", "999"), "do not fit 256"),
        (("--max-length", "8"), "do not fit 8"),
        (("--device", "tpu"), "wanted 'auto', 'cpu'"),
        (("--dtype", "int3"), "int3"),
        (("--routing-out", "/nowhere/at/all.json"), "/nowhere/at/all.json: No such file"),
    ],
)
def test_bad_values(model: str, run: Command, options: tuple[str, str], message: str) -> None:
    result = run("generate", model, "hello", *options)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_empty_prompt(model: str, run: Command) -> None:
    result = run("generate", model, "")
    assert result.exit_code == 1
    assert "the prompt is empty" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_stops_with_130(model: str) -> None:
    # Steps slow enough that the answer is still coming when the signal does.
    code = (
        "import signal, time, flexidepth_ext.engine as engine\n"
        "from flexidepth.cli import main\n"
        # A job in a shell's background is started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "choose = engine.Engine.sample\n"
        "def sample(*arguments, **options):\n"
        "    time.sleep(0.2)\n"
        "    return choose(*arguments, **options)\n"
        "engine.Engine.sample = sample\n"
        "main()\n"
    )
    command = ["generate", model, "hello", "--max-new-tokens", "250", "--eos-token-id", "319"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, "-t", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
