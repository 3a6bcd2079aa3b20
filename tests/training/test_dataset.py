"""Training sets on disk: the same for the same input, made once, whole or not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flexidepth.errors import DataError, SaveError, UnsupportedError, ValueOutOfRangeError
from flexidepth.training import dataset as dataset_module
from flexidepth.training.dataset import PackedDataset, load_packed
from flexidepth.training.packing import COLUMNS, collate

pytest.importorskip("datasets")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    lines: list[dict[str, Any]] = [{"text": f"Text {n}. " * (n % 9 + 1)} for n in range(60)]
    lines += [{"question": f"What is {n}?", "answer": f"A number, {n}."} for n in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def load(source: Path, tokenizer: Any, tmp_path: Path) -> Any:
    def call(sources: Any = source, **options: Any) -> PackedDataset:
        arguments = {"length": 128, "cache_dir": tmp_path / "cache", **options}
        return load_packed(sources, arguments.pop("tokenizer", tokenizer), **arguments)

    return call


def texts(made: PackedDataset, tokenizer: Any) -> list[str]:
    """Every document in it, and every run of labels in their order, as text."""
    found = []
    for item in made:  # type: ignore[attr-defined]
        for number in range(int(item["document_ids"].max()) + 1):
            found.append(tokenizer.decode(item["input_ids"][item["document_ids"] == number]))
    return found


def same(one: PackedDataset, other: PackedDataset) -> bool:
    return len(one) == len(other) and all(
        torch.equal(one[i][name], other[i][name]) for i in range(len(one)) for name in one[i]
    )


def test_items_and_batches(load: Any, tokenizer: Any) -> None:
    said: list[str] = []
    made = load(notify=said.append)
    item = made[0]
    assert list(item) == list(COLUMNS)
    assert all((t.dtype, t.shape) == (torch.int64, (128,)) for t in item.values())
    loader = torch.utils.data.DataLoader(made, batch_size=4, collate_fn=collate)
    batches = list(loader)
    assert torch.equal(batches[0]["input_ids"][1], made[1]["input_ids"])
    assert sum(len(batch["input_ids"]) for batch in batches) == len(made)
    found = texts(made, tokenizer)
    assert len(set(found)) == 120
    assert "Text 1. Text 1. </s>" in found
    assert made.report.documents == 120
    assert "120 documents" in said[0] and "padding" in said[0]


def test_loss_on_answers(load: Any, tokenizer: Any) -> None:
    made = load(loss_on="answers")
    items = [made[i] for i in range(len(made))]
    labels = torch.cat([item["labels"] for item in items])
    said = tokenizer.decode(labels[labels != -100])
    assert "A number, 7.</s>" in said and "What is" not in said
    assert made.report.trained_tokens == int((labels != -100).sum())


def test_seeds_order_and_processes(load: Any, tokenizer: Any, tmp_path: Path) -> None:
    one = load()
    assert same(one, load(cache_dir=tmp_path / "other", num_proc=2))
    two = load(seed=1)
    assert not same(one, two)
    assert sorted(texts(one, tokenizer)) == sorted(texts(two, tokenizer))


def test_long_and_short_documents_come_mixed(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    lines = [{"text": f"{n:0127d}"} for n in range(40)] + [
        {"text": f"{n:031d}"} for n in range(160)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    made = load(path)
    counts = [int(made[i]["document_ids"].max()) + 1 for i in range(len(made))]
    assert sorted(counts) == [1] * 40 + [4] * 40
    # Packing takes the longest first; batches must not.
    assert 10 < counts[:40].count(1) < 30


def test_the_cache(
    load: Any, source: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = load()
    first = made.path
    assert same(load(source.rename(tmp_path / "b.jsonl")), made)
    copy = tmp_path / "b.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "build_set", None)  # not made again
        assert load(copy).path == first
        assert load(copy).report == made.report
    others = [
        load(copy, seed=1),
        load(copy, length=64),
        load(copy, loss_on="answers"),
        load(copy, split="train"),
    ]
    tokenizer.chat_template = tokenizer.chat_template.replace("Be brief.", "Be long.")
    others.append(load(copy))
    with copy.open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    others.append(load(copy))
    assert len({made.path for made in others} | {first}) == 7
    assert others[-1].report.documents == 121
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(
        made.path.name for made in [made, *others]
    )


def test_train_and_held_out_are_the_whole_and_nothing_twice(load: Any, tokenizer: Any) -> None:
    whole = texts(load(), tokenizer)
    held = texts(load(split="held_out", held_out_share=0.3), tokenizer)
    train = texts(load(split="train", held_out_share=0.3), tokenizer)
    assert sorted(held + train) == sorted(whole)
    assert 15 < len(held) < 60
    with pytest.raises(DataError, match="none of 120 documents falls into the split 'held_out'"):
        load(split="held_out", held_out_share=1e-9)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_what_is_wrong_is_said_and_nothing_is_kept(
    load: Any, tokenizer: Any, source: Path, tmp_path: Path, num_proc: int
) -> None:
    with source.open("a", encoding="utf-8") as file:
        file.write('{"text": 5}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 121: text is a int"):
        load(num_proc=num_proc)
    assert list((tmp_path / "cache").iterdir()) == []
    said: list[str] = []
    made = load(skip_broken=True, notify=said.append, num_proc=num_proc)
    assert made.report.skipped == 1
    assert "1 broken lines skipped, the first: " in said[0] and "line 121" in said[0]
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match=r"a\.jsonl, line \d+: a conversation, but"):
        load(skip_broken=True, num_proc=num_proc)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nothing_to_predict(load: Any, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding="utf-8")
    with pytest.raises(DataError, match="1 documents, but no token to be predicted"):
        load(path, loss_on="answers")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"length": 1}, "length is 1"),
        ({"length": 2.5}, "length is 2.5"),
        ({"seed": -1}, "seed is -1"),
        ({"split": "test"}, "split is 'test'"),
        ({"held_out_share": 0}, "held-out share is 0"),
        ({"num_proc": 0}, "num_proc is 0"),
        ({"loss_on": "none"}, "loss_on is 'none'"),
    ],
)
def test_options_out_of_range(load: Any, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueOutOfRangeError, match=problem):
        load(**options)


def test_an_option_of_another_name(load: Any) -> None:
    with pytest.raises(TypeError, match="lenght"):
        load(lenght=5)


def test_a_cache_that_cannot_be_written(load: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SaveError, match="cannot write in"):
        load(cache_dir=tmp_path / "file" / "cache")


def test_without_the_package(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r'pip install "flexidepth\[train\]"'):
        load()
