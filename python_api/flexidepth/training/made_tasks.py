"""Made-up tasks, of the kinds over which the paper compares the layers used (arXiv 2503.23798): copying, lists,
reckoning, and summaries and continuations of given texts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..arguments import seed_number, whole_number
from ..errors import ValueOutOfRangeError

KINDS = ("copy", "list", "add", "multiply", "summarise", "continue")
FROM_TEXTS = ("summarise", "continue")
SPLITS = ("train", "eval", "all")
_EVAL_SHARE = 8  # one task of as many is for evaluation
_MOST_DRAWS = 50  # for each task wanted, before the kind is taken for exhausted
_LEAST_WORDS = 30  # of a text to summarise or to continue
_MOST_WORDS = 200


def _words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


_PEOPLE = _words("Ada Ben Clara David Emma Felix Grace Hugo Iris Jonas Lena Marco Nora Oscar Paula")
_VERBS = _words("found bought painted carried forgot repaired borrowed counted sold hid")
_ADJECTIVES = _words("old small green heavy broken bright wooden empty quiet strange golden round")
_NOUNS = _words(
    "apple bicycle boat book bottle bridge button camera candle chair clock coin cup drum engine feather fence "
    "flower garden guitar hammer hat house kettle key ladder lamp letter map mirror mountain needle painting "
    "paper pencil piano picture plate pocket radio ribbon river rope saddle ship shoe spoon stone table tent "
    "ticket tower train tree umbrella village violin wagon wheel window"
)
_PLACES = _words(
    "near the river;in the garden;behind the school;at the market;under the bridge;on the hill;"
    "in the attic;beside the road;at the station;in the forest",
    ";",
)
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

Task = dict[str, Any]


def make_tasks(
    kind: str, n: int, seed: int = 0, *, split: str = "train", texts: Sequence[str] | None = None
) -> list[Task]:
    """`n` different tasks of one kind.

    A hash of what is asked (for "summarise" and "continue" of the text) says whether a task may be trained on
    or is for evaluation, so the two never meet, whatever the seeds.

    Args:
        kind: "copy" a made-up paragraph, "list": repeat a list, "add" and "multiply" two whole numbers,
            "summarise" or "continue" a given text.
        n: how many. seed: another one gives others. split: "train", "eval", or "all" where the texts given are held
            apart already.
        texts: what "summarise" and "continue" take; those of too few words are passed over.

    Returns:
        {"kind", "prompt", "answer"} each; the answer is None where there is no single right one.

    Raises:
        ValueOutOfRangeError: an unknown kind or split, texts that are missing, given to a kind that makes its
            own or too few, or an n or seed out of range.
    """
    n = whole_number("tasks: n", n, 1)
    seed = seed_number("tasks: seed", seed)
    if kind not in KINDS:
        raise ValueOutOfRangeError(f"tasks: kind {kind!r}; wanted one of {', '.join(KINDS)}")
    if split not in SPLITS:
        raise ValueOutOfRangeError(f"tasks: split {split!r}; wanted one of {', '.join(SPLITS)}")
    if (kind in FROM_TEXTS) != (texts is not None):
        needs = "needs texts" if kind in FROM_TEXTS else "makes its own text; give no texts"
        raise ValueOutOfRangeError(f"tasks: kind {kind!r} {needs}")
    # A text as seed: the same in every process and version, unlike a tuple's hash.
    draw = random.Random(f"{kind} {seed}")
    tasks: list[Task] = []
    seen: set[str] = set()
    candidates = (
        _from_texts(kind, texts, draw)
        if texts is not None
        else (_MAKERS[kind](draw) for _ in range(_MOST_DRAWS * (n + _EVAL_SHARE)))
    )
    for asked, prompt, answer in candidates:
        if asked in seen or split not in ("all", _split_of(kind, asked)):
            continue
        seen.add(asked)
        tasks.append({"kind": kind, "prompt": prompt, "answer": answer})
        if len(tasks) == n:
            return tasks
    raise ValueOutOfRangeError(
        f"tasks: only {len(tasks)} different {kind!r} tasks of the split {split!r}, wanted {n}; "
        + ("give more texts" if texts is not None else "ask for fewer")
    )


def _split_of(kind: str, asked: str) -> str:
    # Texts are told apart for both kinds at once: none is trained on as one and evaluated as the other.
    group = "text" if kind in FROM_TEXTS else kind
    digest = hashlib.sha256(f"{group}\n{' '.join(asked.split())}".encode()).digest()
    return "eval" if digest[0] % _EVAL_SHARE == 0 else "train"


# Each maker returns what the task is told apart by, its prompt and its answer.
Made = tuple[str, str, "str | None"]


def _copy(draw: random.Random) -> Made:
    text = " ".join(_sentence(draw) for _ in range(draw.randint(2, 5)))
    ask = draw.choice(("Copy the following text exactly:", "Repeat this text word for word:"))
    return text, f"{ask}\n\n{text}", text


def _sentence(draw: random.Random) -> str:
    a, b = draw.sample(_NOUNS, 2)
    who, verb, place = draw.choice(_PEOPLE), draw.choice(_VERBS), draw.choice(_PLACES)
    x, y = draw.sample(_ADJECTIVES, 2)
    return draw.choice(
        (
            f"On {draw.choice(_DAYS)}, {who} {verb} the {x} {a} {place}.",
            f"{who} {verb} {draw.randint(2, 60)} {a}s and a {x} {b} {place}.",
            f"The {x} {a} was {place}, but the {y} {b} was not.",
            f"{who} {verb} a {x} {a} and gave {draw.choice(_PEOPLE)} the {b}.",
        )
    )


def _list(draw: random.Random) -> Made:
    items = draw.sample(_NOUNS, draw.randint(4, 10))
    if draw.random() < 0.5:
        items = [str(draw.randint(1, 999)) for _ in items]
    text = ", ".join(items)
    ask = draw.choice(("Repeat the following list:", "Write this list again, in the same order:"))
    return text, f"{ask} {text}", text


def _add(draw: random.Random) -> Made:
    a, b = (draw.randint(1, 10 ** draw.randint(1, 4) - 1) for _ in range(2))
    ask = draw.choice((f"What is {a} + {b}?", f"Add {a} and {b}.", f"Calculate {a} + {b}."))
    return f"{a} {b}", ask, str(a + b)


def _multiply(draw: random.Random) -> Made:
    a, b = (draw.randint(2, 10 ** draw.randint(1, 3) - 1) for _ in range(2))
    ask = draw.choice((f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"Calculate {a} * {b}."))
    return f"{a} {b}", ask, str(a * b)


_MAKERS: dict[str, Callable[[random.Random], Made]] = {
    "copy": _copy,
    "list": _list,
    "add": _add,
    "multiply": _multiply,
}


def _from_texts(kind: str, texts: Sequence[str], draw: random.Random) -> Iterator[Made]:
    asks = {
        "summarise": ("Summarise the following text in one or two sentences:", "Sum this text up:"),
        "continue": ("Continue the following text:", "Write on where this text ends:"),
    }[kind]
    for text in draw.sample(list(texts), len(texts)):
        words = text.split()
        if len(words) < _LEAST_WORDS:
            continue
        # Of a text to be continued only a beginning, cut where nothing ends.
        most = len(words) // 2 if kind == "continue" else len(words)
        part = " ".join(words[: min(most, _MOST_WORDS)])
        yield text, f"{draw.choice(asks)}\n\n{part}", None
