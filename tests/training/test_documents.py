"""Reading documents: every form, every way to be broken, and no more in memory than one at a time."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from flexidepth.errors import DataError, UnsupportedError
from flexidepth.training.documents import Document, read_documents

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(path: Path, *lines: Any) -> Path:
    """Objects as JSON, bytes and texts as they are."""
    with path.open("wb") as file:
        for line in lines:
            text = line if isinstance(line, (str, bytes)) else json.dumps(line)
            file.write((text.encode() if isinstance(text, str) else text) + b"\n")
    return path


def contents(documents: Any) -> list[Any]:
    return [d.text if d.messages is None else list(d.messages) for d in documents]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"text": "A text.", "id": 7}, "A text."),
        ({"messages": CHAT}, CHAT),
        ({"messages": [{"role": "system", "content": ""}, *CHAT]}, None),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            CHAT,
        ),
        ({"prompt": "Hi", "completion": "Hello"}, CHAT),
        ({"question": "Hi", "answer": "Hello"}, CHAT),
        ({"prompt": "Hi", "response": "Hello", "answer": None}, CHAT),
    ],
)
def test_every_form(tmp_path: Path, record: dict[str, Any], wanted: Any) -> None:
    found = contents(read_documents(write(tmp_path / "a.jsonl", record)))
    assert found == [record["messages"] if wanted is None else wanted]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "half', "not valid JSON: .* at column"),
        ("", "empty"),
        ("[1, 2]", "a JSON list; wanted an object"),
        (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 14"),
        ({"text": "  "}, "text is empty"),
        ({"text": 5}, "text is a int"),
        ('{"text": "\\ud800"}', "text has half a character"),
        ({"title": "x"}, "keys are title; wanted"),
        ({"prompt": "Hi"}, "prompt without an answer.*distill-data"),
        ({"prompt": "Hi", "answer": ""}, "answer is empty"),
        ({"messages": []}, "messages is \\[\\]"),
        ({"messages": "Hi"}, "messages is 'Hi'"),
        ({"messages": ["Hi"]}, "message 0 is a str"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "message 0: role is 'bot'"),
        ({"messages": [*CHAT, {"role": "user"}]}, "message 2: content is a NoneType"),
        ({"messages": [{"role": "user", "content": ""}]}, "message 0: content is empty"),
        (
            {"conversations": [{"from": "alien", "value": "Hi"}]},
            "conversations, turn 0: \"from\" is 'alien'",
        ),
        ({"conversations": [{"from": "gpt"}]}, "message 0: content is a NoneType"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: Any, problem: str) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "good"}, line, {"text": "also good"})
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {problem}"):
        list(read_documents(path))
    documents = read_documents(path, skip_broken=True)
    assert contents(documents) == ["good", "also good"]
    assert (documents.num_read, documents.num_skipped) == (2, 1)
    assert "line 2" in str(documents.first_skipped)


def test_deep_nesting_is_a_broken_line_too(tmp_path: Path) -> None:
    deep = "[" * (sys.getrecursionlimit() * 100)
    with pytest.raises(DataError, match="line 1"):
        list(read_documents(write(tmp_path / "a.jsonl", deep)))


def test_several_sources_in_order_and_a_mark_at_the_beginning(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", b"\xef\xbb\xbf" + b'{"text": "one"}')
    two = tmp_path / "2.txt"
    two.write_bytes(b"\xef\xbb\xbftwo\r\n")
    assert contents(read_documents([two, str(one)])) == ["two", "one"]


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    paragraphs = [f"{n} " + "word " * 150 for n in range(12)]  # 750 characters each
    path.write_text("\n\n\n" + "\n \n".join(paragraphs), encoding="utf-8")
    found = list(read_documents(path))
    assert len(found) == 4
    assert all(2000 < len(d.text or "") < 3500 for d in found)
    assert "".join("".join((d.text or "").split()) for d in found) == "".join(
        "".join(p.split()) for p in paragraphs
    )
    assert [d.where.rpartition(" ")[2] for d in found] == ["4", "10", "16", "22"]


def test_a_text_file_without_blank_lines_comes_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "äöü€" * 40_000  # several bytes a character, no end of line
    path.write_text(text, encoding="utf-8")
    tracemalloc.start()
    found = list(read_documents(path))
    tracemalloc.stop()
    assert "".join(d.text or "" for d in found) == text
    assert len(found) > 3


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\ncaf\xe9\nfine\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: not UTF-8: byte 0xe9 at byte 4"):
        list(read_documents(path))
    documents = read_documents(path, skip_broken=True)
    assert contents(documents) == ["good\nfine"]
    path.write_bytes(b"good \xc3")
    with pytest.raises(DataError, match="line 1: not UTF-8"):
        list(read_documents(path))


def test_reading_keeps_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": "x" * 10_000} for _ in range(2000)))
    documents = read_documents(path)
    next(documents)
    tracemalloc.start()
    number = sum(1 for _ in documents)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 1999
    assert peak < 1_000_000  # the file has 20 MB


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": "one", "messages": None}, {"text": None, "messages": CHAT}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert contents(read_documents(tmp_path / "saved")) == ["one", CHAT]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    splits.save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match=r"several splits; give those you want: .*train"):
        read_documents(tmp_path / "splits")
    assert len(list(read_documents(tmp_path / "splits" / "train"))) == 2
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(DataError, match="not a whole dataset"):
        list(read_documents(tmp_path / "saved"))


def test_a_saved_dataset_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r'pip install "flexidepth\[train\]"'):
        list(read_documents(tmp_path))


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no source"):
        read_documents([])
    with pytest.raises(DataError, match="no such file"):
        read_documents(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a file of kind '\.csv'"):
        read_documents(write(tmp_path / "a.csv"))
    with pytest.raises(DataError, match="not of a saved dataset"):
        read_documents(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl: no document; the source is empty"):
        list(read_documents(write(tmp_path / "a.jsonl")))
    broken = read_documents(write(tmp_path / "b.jsonl", "{"), skip_broken=True)
    with pytest.raises(DataError, match="no document; 1 broken ones were skipped, the first: "):
        list(broken)


def test_what_a_document_says_is_its_digest() -> None:
    one = Document("here", text="a  b\n")
    assert one.digest() == Document("there", text="a b").digest()
    assert one.digest() != one.digest(seed=1)
    assert one.digest() != Document("here", text="ab").digest()
    assert Document("", messages=tuple(CHAT)).digest() != Document("", text="HiHello").digest()
