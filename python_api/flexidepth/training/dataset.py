"""Training sets: packed once, kept on disk for the next run, read through a memory map."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arguments import whole_number
from ..checkpoints.default_model import cache_directory
from ..checkpoints.partial import partial_directory, sync
from ..errors import DataError
from .building import REPORT, DataReport, PackingOptions, build_set
from .packing import COLUMNS
from .records import Sources, import_datasets, source_paths
from .tokenization import check_tokenizer, tokenizer_identity

Notify = Callable[[str], None]

_FORMAT = 1  # raised when the same arguments begin to give something else


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed sequences, memory-mapped. Items are dictionaries of int64 [length]: input_ids, labels,
    position_ids, document_ids (flexidepth.training.packing.pack). report: what went in. path: where it lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = import_datasets().load_from_disk(str(path)).with_format("torch")
        self.report = DataReport(**json.loads((path / REPORT).read_text(encoding="utf-8")))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item: dict[str, Tensor] = self.data[index]
        return item

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        # What torch's loader asks for where it can: one read for the whole batch.
        rows = self.data[indices]
        return [{name: rows[name][i] for name in COLUMNS} for i in range(len(indices))]


def load_packed(
    sources: Sources,
    tokenizer: Any,
    *,
    num_proc: int | None = None,
    cache_dir: str | Path | None = None,
    notify: Notify | None = None,
    **options: Any,
) -> PackedDataset:
    """A packed training set; one made before of the same content, tokenizer and options is read from the cache.

    Args:
        sources: see `read_documents`.
        tokenizer: the model's.
        num_proc: processes that tokenise; None = as many as there are processors, one for small sets.
        cache_dir: where sets are kept; None = "datasets" in the cache folder of the package.
        notify: called with a line of text for each thing worth telling the user.
        options: length, tokens of a sequence; loss_on, "all" or "answers" (what the assistant says; plain texts
            count whole); seed of the order; split, "all", "train" or "held_out", by `is_held_out` with
            held_out_share and split_seed; skip_broken, leave broken lines out.

    Raises:
        ValueOutOfRangeError: an option out of range. UnsupportedError: `datasets` is missing, or a tokenizer
            that cannot do what is asked. DataError: see `read_documents`; nothing left after the split; nothing
            to predict. SaveError: the cache cannot be written.
    """
    wanted = PackingOptions(**options)
    check_tokenizer(tokenizer, wanted.loss_on)
    if num_proc is not None:
        num_proc = whole_number("data: num_proc", num_proc, 1)
    paths = source_paths(sources)
    say = notify or (lambda _: None)
    folder = Path(cache_dir) if cache_dir is not None else cache_directory() / "datasets"
    target = folder / _fingerprint(paths, tokenizer, wanted)
    if not target.exists():
        size = sum(path.stat().st_size for path in _files(paths))
        with partial_directory(target, size) as partial:
            build_set(partial, paths, tokenizer, wanted, num_proc)
            sync(partial)
            _move(partial, target)
    made = PackedDataset(target)
    say(f"{', '.join(map(str, paths))}: {made.report}")
    return made


def _move(partial: Path, target: Path) -> None:
    """Rename, unless another process made the same set meanwhile, which may be in use already."""
    try:
        os.rename(partial, target)
    except OSError:
        if not target.exists():
            raise


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _fingerprint(paths: list[Path], tokenizer: Any, options: PackingOptions) -> str:
    """Of what the sources hold, not of their names or dates."""
    import_datasets()
    from datasets.fingerprint import Hasher

    digests = []
    for path in _files(paths):
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        digests.append(path.suffix + digest.hexdigest())
    content = [_FORMAT, digests, tokenizer_identity(tokenizer), sorted(asdict(options).items())]
    return str(Hasher.hash(json.dumps(content)))
