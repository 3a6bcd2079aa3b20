"""Self-distillation: the base model's own answers, the same file whether or not it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexidepth.errors import DataError, SaveError, ValueOutOfRangeError
from flexidepth.llm import FlexiDepth
from flexidepth.training import self_distillation
from flexidepth.training.documents import read_documents
from flexidepth.training.prompts import read_prompts
from flexidepth.training.self_distillation import DistillOptions, DistillReport, distill
from tests.api.conftest import llm, model
from tests.cli.conftest import Command, run

__all__ = ["llm", "model", "run"]

OPTIONS = DistillOptions(max_new_tokens=12, temperature=1.0, top_p=1.0, keep_unfinished=True)


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [{"question": f"What is {n}?", "answer": None} for n in range(20)]
    lines.append({"messages": [{"role": "system", "content": "Be brief."}, *chat("Hi", "Hello")]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_the_base_models(llm: FlexiDepth, prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    prompts = read_prompts(prompts_file)
    report = distill(llm, prompts, out, OPTIONS)
    found = lines(out)
    assert report.written == len(found) >= 20
    seeds = set()
    for line in found:
        meta = line["meta"]
        asked = prompts[meta["prompt"]]
        assert line["messages"][:-1] == list(asked.messages)
        alone = llm.generate(
            list(asked.messages),
            seed=meta["seed"],
            max_new_tokens=12,
            temperature=1.0,
            force_routing="all",
        )
        assert line["messages"][-1] == {"role": "assistant", "content": alone.text}
        assert meta["finish_reason"] == alone.finish_reason
        assert meta["new_tokens"] == len(alone.token_ids)
        seeds.add(meta["seed"])
    assert len(seeds) == len(found)
    assert report.tokens >= sum(line["meta"]["new_tokens"] for line in found)
    assert len(list(read_documents(out))) == len(found)
    # With routing the answers are others, or the above would prove nothing.
    routed = llm.generate(
        list(prompts[0].messages), seed=found[0]["meta"]["seed"], max_new_tokens=12, temperature=1.0
    )
    assert routed.text != found[0]["messages"][-1]["content"]


@pytest.mark.parametrize("cut", [0, 5, 40, 700, 1500, 2900, -1])
def test_an_interrupted_run_ends_with_the_same_file(
    llm: FlexiDepth, prompts_file: Path, tmp_path: Path, cut: int
) -> None:
    prompts = read_prompts(prompts_file)
    options = DistillOptions(max_new_tokens=8, temperature=1.0, top_p=0.9, samples_per_prompt=2)
    # Some end, most do not: what is dropped must not confuse the count.
    options = DistillOptions(**{**vars(options), "keep_unfinished": cut % 2 == 0})
    whole = tmp_path / "whole.jsonl"
    if not options.keep_unfinished:
        llm.config.eos_token_id = list(range(0, 258, 5))
    try:
        report = distill(llm, prompts, whole, options, batch_size=8)
        assert (report.unfinished > 0) == (not options.keep_unfinished)
        content = whole.read_bytes()
        out = tmp_path / "out.jsonl"
        out.write_bytes(content[:cut])
        resumed = distill(llm, prompts, out, options, batch_size=3)
        assert out.read_bytes() == content
        assert resumed.resumed <= 42
        assert resumed.written == report.written - content[:cut].count(b"\n")
        again = distill(llm, prompts, out, options)
        assert out.read_bytes() == content and again.written == 0
    finally:
        llm.config.eos_token_id = 257


def test_killed_in_the_middle(llm: FlexiDepth, prompts_file: Path, tmp_path: Path) -> None:
    prompts = read_prompts(prompts_file)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    distill(llm, prompts, whole, OPTIONS)

    def stop(done: int, total: int, tokens: int) -> None:
        assert total == 21
        if tokens == 120:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(llm, prompts, out, OPTIONS, progress=stop)
    assert 0 < len(lines(out)) < 21
    seen: list[tuple[int, int, int]] = []
    distill(llm, prompts, out, OPTIONS, progress=lambda *now: seen.append(now))
    assert out.read_bytes() == whole.read_bytes()
    assert seen[-1][:2] == (21, 21)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_more_prompts_go_on_where_fewer_ended(
    llm: FlexiDepth, prompts_file: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    distill(llm, read_prompts(prompts_file), whole, OPTIONS)
    distill(llm, read_prompts(prompts_file, limit=5), out, OPTIONS)
    assert len(lines(out)) <= 5
    distill(llm, read_prompts(prompts_file), out, OPTIONS)
    assert out.read_bytes() == whole.read_bytes()


def test_what_does_not_end_is_dropped(llm: FlexiDepth, prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    options = DistillOptions(max_new_tokens=3, temperature=1.0)
    report = distill(llm, read_prompts(prompts_file), out, options)
    assert report.unfinished > 15
    assert all(line["meta"]["finish_reason"] == "eos" for line in lines(out))
    assert len(lines(out)) == report.written
    assert "without an end dropped" in str(report)


def test_prompts_that_leave_no_room(llm: FlexiDepth, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    texts = ["short", "x" * 2000, "short too"]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    out = tmp_path / "out.jsonl"
    report = distill(llm, read_prompts(path), out, OPTIONS)
    assert (report.too_long, report.written + report.empty) == (1, 2)
    assert [line["meta"]["prompt"] for line in lines(out)] == [0, 2]


def test_files_of_others_are_left_alone(
    llm: FlexiDepth, prompts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    prompts = read_prompts(prompts_file)
    for content in (b"notes", b"notes\n", b'{"text": "a"}\n', b'{"messages": [], "meta": 5}\n'):
        out.write_bytes(content)
        with pytest.raises(SaveError, match=r"holds something else.*--overwrite"):
            distill(llm, prompts, out, OPTIONS)
        assert out.read_bytes() == content
    distill(llm, prompts, out, OPTIONS, overwrite=True)
    content = out.read_bytes()
    other = DistillOptions(max_new_tokens=12, temperature=0.9, top_p=1.0, keep_unfinished=True)
    with pytest.raises(SaveError, match="another model or of other options"):
        distill(llm, prompts, out, other)
    with pytest.raises(SaveError, match="its last answer is to prompt 20, which is another one"):
        distill(llm, prompts[:3], out, OPTIONS)
    with pytest.raises(SaveError, match="its last answer is to prompt 20, which is another one"):
        distill(llm, [*prompts[:20], prompts[0]], out, OPTIONS)
    assert out.read_bytes() == content
    with pytest.raises(SaveError, match="cannot be written"):
        distill(llm, prompts, tmp_path / "none" / "out.jsonl", OPTIONS)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"samples_per_prompt": 0}, "samples_per_prompt is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 0, "samples_per_prompt": 2}, "2 samples a prompt at temperature 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=problem):
        DistillOptions(**options)


def test_every_form_of_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"

    def read(record: Any) -> list[dict[str, str]]:
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        return list(read_prompts(path)[0].messages)

    asked = chat("Hi")
    for record in (
        {"text": "Hi"},
        {"prompt": "Hi"},
        {"prompt": asked, "completion": chat("Hello")},
        {"question": "Hi", "answer": 5},
        {"messages": asked},
        {"messages": chat("Hi", "Hello")},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ):
        assert read(record) == asked
    assert read({"messages": chat("Hi", "Hello", "So?", "Yes.")}) == chat("Hi", "Hello", "So?")
    for record, problem in (
        ({"messages": [{"role": "assistant", "content": "Hello"}]}, "nobody asks anything"),
        ({"messages": [{"role": "system", "content": "Hello"}]}, "nobody asks anything"),
        ({"title": "Hi"}, "line 1: keys are "),
        ({"question": ""}, "line 1: question is empty"),
    ):
        with pytest.raises(DataError, match=problem):
            read(record)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no prompt"):
        read_prompts(path)


def test_the_command(
    run: Command,
    llm: FlexiDepth,
    prompts_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The command's own part: options to distill, report to the user.
    monkeypatch.setattr("flexidepth.cli.distill_data.load_model", lambda *_, **__: llm)
    seen: dict[str, Any] = {}

    def stand_in(*arguments: Any, **others: Any) -> DistillReport:
        seen.update(others, options=arguments[3], prompts=len(arguments[1]))
        others["progress"](1, 4, 9)
        return DistillReport(written=3, unfinished=1, tokens=9)

    monkeypatch.setattr(self_distillation, "distill", stand_in)
    out = tmp_path / "out.jsonl"
    arguments = ("--prompts", prompts_file, "--out", out, "-n", 5, "--temperature", 0.5)
    others = ("--top-p", 0.9, "--samples-per-prompt", 2, "--batch-size", 4, "--seed", 7)
    result = run("distill-data", "model", *arguments, *others, "--limit", 4)
    assert result.exit_code == 0, result.output
    assert "3 answers written, 9 tokens, 1 without an end dropped" in result.output
    assert seen["options"] == DistillOptions(5, 0.5, 0.9, 2, 7, False)
    assert (seen["prompts"], seen["batch_size"], seen["overwrite"]) == (4, 4, False)
    result = run("distill-data", "model", *arguments, "--top-p", 2)
    assert result.exit_code == 2 and "top_p is 2" in result.output
