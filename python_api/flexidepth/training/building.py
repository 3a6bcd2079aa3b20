"""From documents to packed sequences on the disk, through `datasets`.

`datasets` does the work that it does well: Dataset.map gives processes and a progress bar, and its Arrow files are
memory-mapped, so a set may be larger than the memory. Which documents there are is read here: its own readers
take a broken line for an error without a line number, or for none.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexidepth_ext import _C

from ..arguments import seed_number, whole_number
from ..errors import DataError, ValueOutOfRangeError
from .documents import Documents, make_document, read_documents
from .held_out import check_share, is_held_out
from .packing import COLUMNS, PackingCounts, pack
from .records import import_datasets
from .tokenization import tokenize

SPLITS = ("all", "train", "held_out")
REPORT = "report.json"
_FEW_DOCUMENTS = 500  # for as many, starting processes takes longer than it saves
_BATCH = 200


@dataclass(frozen=True)
class PackingOptions:
    """What decides, with sources and tokenizer, which set comes out: see `load_packed`."""

    length: int
    loss_on: str = "all"
    seed: int = 0
    split: str = "all"
    held_out_share: float = 0.02
    split_seed: int = 0
    skip_broken: bool = False

    def __post_init__(self) -> None:
        whole_number("data: length", self.length, 2)
        seed_number("data: split_seed", self.split_seed)
        whole_number("data: seed", self.seed, 0)  # numpy's generator takes no sign
        check_share(self.held_out_share)
        if self.split not in SPLITS:
            raise ValueOutOfRangeError(
                f"data: split is {self.split!r}; wanted one of {', '.join(SPLITS)}"
            )


@dataclass
class DataReport(PackingCounts):
    """PackingCounts, and how many broken lines were skipped, and what was wrong with the first one."""

    skipped: int = 0
    first_skipped: str | None = None

    def __str__(self) -> str:
        parts = [
            f"{self.documents:,} documents, {self.tokens:,} tokens ({self.trained_tokens:,} to be predicted)",
            f"{self.sequences:,} sequences, {self.padding_share:.2%} padding",
        ]
        if self.dropped:
            parts.append(f"{self.dropped:,} pieces without anything to predict dropped")
        if self.skipped:
            parts.append(f"{self.skipped:,} broken lines skipped, the first: {self.first_skipped}")
        return "; ".join(parts)


def build_set(
    partial: Path, paths: list[Path], tokenizer: Any, options: PackingOptions, num_proc: int | None
) -> None:
    """Write a set and its report into the directory `partial`; see `flexidepth.training.dataset.load_packed`."""
    with _bars_on_a_terminal():
        _build(partial, paths, tokenizer, options, num_proc)


def _build(
    partial: Path, paths: list[Path], tokenizer: Any, options: PackingOptions, num_proc: int | None
) -> None:
    datasets = import_datasets()
    work = partial / "work"
    work.mkdir()
    documents = read_documents(list(paths), skip_broken=options.skip_broken)
    texts = _write(
        work / "documents.arrow",
        {"where": datasets.Value("string"), "document": datasets.Value("large_string")},
        _of_split(documents, options),
    )
    if len(texts) == 0:
        raise DataError(
            f"data: none of {documents.num_read} documents falls into the split {options.split!r}; "
            "give more, or held-out text of its own (--held-out)"
        )
    tokens = _tokenized(texts, work / "tokens.arrow", tokenizer, options.loss_on, num_proc)
    report = DataReport(skipped=documents.num_skipped, first_skipped=documents.first_skipped)
    row = datasets.Sequence(datasets.Value("int32"), length=options.length)
    packed = _write(
        work / "packed.arrow",
        dict.fromkeys(COLUMNS, row),
        pack(
            _in_order(tokens, options.seed),
            options.length,
            report,
            pad_id=_pad_id(tokenizer),
        ),
    )
    if report.trained_tokens == 0:
        raise DataError(
            f"data: {report.documents} documents, but no token to be predicted; is loss_on="
            f"{options.loss_on!r} meant, and are there answers?"
        )
    # Packing puts what is of one length together; a batch should be a fair sample.
    packed.shuffle(seed=options.seed, keep_in_memory=True).save_to_disk(str(partial))
    (partial / REPORT).write_text(json.dumps(asdict(report), ensure_ascii=False), "utf-8")
    shutil.rmtree(work)


def _of_split(documents: Documents, options: PackingOptions) -> Iterator[dict[str, Any]]:
    for document in documents:
        if options.split != "all":
            held_out = is_held_out(document, options.held_out_share, options.split_seed)
            if held_out != (options.split == "held_out"):
                continue
        yield {"where": document.where, "document": json.dumps(document.record())}


def _write(path: Path, features: dict[str, Any], rows: Iterator[dict[str, Any]]) -> Any:
    """The rows as a memory-mapped dataset at `path`."""
    datasets = import_datasets()
    from datasets.arrow_writer import ArrowWriter

    writer = ArrowWriter(path=str(path), features=datasets.Features(features))
    try:
        for row in rows:
            writer.write(row)
        writer.finalize()
    finally:
        writer.close()
    return datasets.Dataset.from_file(str(path))


def _tokenized(texts: Any, path: Path, tokenizer: Any, loss_on: str, num_proc: int | None) -> Any:
    """The documents as ids and predicted, in their order, written to `path`."""
    datasets = import_datasets()
    if num_proc is None:
        num_proc = 1 if len(texts) < _FEW_DOCUMENTS else int(_C.available_threads())
    return texts.map(
        _tokenize_batch,
        batched=True,
        batch_size=_BATCH,
        fn_kwargs={"tokenizer": tokenizer, "loss_on": loss_on},
        remove_columns=texts.column_names,
        features=datasets.Features(
            ids=datasets.Sequence(datasets.Value("int32")),
            predicted=datasets.Sequence(datasets.Value("bool")),
        ),
        num_proc=min(num_proc, len(texts)) if num_proc > 1 else None,
        cache_file_name=str(path),
        load_from_cache_file=False,
        new_fingerprint="tokens",
        desc="tokenizing",
    )


def _tokenize_batch(batch: dict[str, list[str]], tokenizer: Any, loss_on: str) -> dict[str, Any]:
    both = [
        tokenize(make_document(json.loads(text), where), tokenizer, loss_on)
        for where, text in zip(batch["where"], batch["document"], strict=True)
    ]
    return {"ids": [ids for ids, _ in both], "predicted": [predicted for _, predicted in both]}


def _in_order(tokens: Any, seed: int) -> Iterator[tuple[Any, Any]]:
    shuffled = tokens.shuffle(seed=seed, keep_in_memory=True).with_format("numpy")
    for batch in shuffled.iter(batch_size=_BATCH):
        for ids, predicted in zip(batch["ids"], batch["predicted"], strict=True):
            yield np.asarray(ids, np.int32), np.asarray(predicted, np.bool_)


def _pad_id(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """The progress bars of `datasets` for who can watch them; a log file would get a line for each step."""
    datasets = import_datasets()
    quiet = not (sys.stderr.isatty() or datasets.are_progress_bars_disabled())
    if quiet:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if quiet:
            datasets.enable_progress_bars()
