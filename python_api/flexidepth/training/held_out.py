"""A held-out part that the training part never overlaps: what a document says decides where it goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..arguments import as_number, seed_number, whole_number
from ..errors import ValueOutOfRangeError
from .documents import Document, make_document

Item = TypeVar("Item", Document, Mapping[str, Any])


def check_share(share: Any) -> float:
    """The held-out share as float. Raises ValueOutOfRangeError outside (0, 1)."""
    number = as_number(share)
    if number is None or not 0 < number < 1:
        raise ValueOutOfRangeError(f"data: held-out share is {share!r}; wanted a number in (0, 1)")
    return number


def is_held_out(document: Document, share: float, seed: int = 0) -> bool:
    """Whether a document is one of the held-out `share`: the same answer in every set, run and process."""
    return _place(document, seed) < share


def split_held_out(
    documents: Iterable[Item],
    *,
    share: float | None = None,
    num_documents: int | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Split into (training, held-out) by a hash of what each document says, spaces aside.

    Copies of one document always fall on the same side. With `share` a document's side depends on nothing else
    (`is_held_out`), so no run ever trains on what another holds out under the same seed and share, whatever
    was added to the set meanwhile. With `num_documents` those with the smallest hashes are held out, so it
    depends on the set.

    Args:
        documents: Documents, records as `read_documents` takes them, or a datasets.Dataset of such rows.
        share: of the documents to hold out, in (0, 1); or
        num_documents: how many. Copies of the last one come along.
        seed: another seed is another split.

    Returns:
        Two lists in the order given, or two datasets of a datasets.Dataset.

    Raises:
        ValueOutOfRangeError: not one of share and num_documents, or out of range (at least one document must
            be left to train on). DataError: a record in no known form.
    """
    if (share is None) == (num_documents is None):
        raise ValueOutOfRangeError(
            f"data: {'neither' if share is None else 'both'} of share and num_documents; give one of them"
        )
    seed = seed_number("data: seed", seed)
    items: Any = documents if hasattr(documents, "select") else list(documents)
    places = [_place(_document(item, number), seed) for number, item in enumerate(items)]
    if share is not None:
        limit = check_share(share)
    else:
        count = whole_number("data: num_documents", num_documents, 1, max(1, len(places) - 1))
        # Behind the last one held out, and behind its copies.
        limit = next((p for p in sorted(places)[count:] if p > sorted(places)[count - 1]), 1.0)
    train = [number for number, place in enumerate(places) if place >= limit]
    held_out = [number for number, place in enumerate(places) if place < limit]
    if hasattr(items, "select"):
        return items.select(train), items.select(held_out)
    return [items[number] for number in train], [items[number] for number in held_out]


def _document(item: Document | Mapping[str, Any], number: int) -> Document:
    if isinstance(item, Document):
        return item
    # A column that this row lacks is there as None.
    present = {key: value for key, value in item.items() if value is not None}
    return make_document(present, f"row {number}")


def _place(document: Document, seed: int) -> float:
    """Where in [0, 1) the document falls."""
    return int.from_bytes(document.digest(seed)[:6], "big") / (1 << 48)
