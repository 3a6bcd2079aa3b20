"""Tables of an evaluation, for Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .rows import AnswersRow, KindRow, Row, TaskRow, TextRow

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from .run import EvalResult


@dataclass(frozen=True)
class Table:
    """A title, headings and rows of text; the first `names` columns hold words, the others numbers."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    names: int = 1


def tables(result: EvalResult) -> list[Table]:
    """Every table that the rows give: overviews first, then every figure."""
    texts = [row for row in result.rows if isinstance(row, TextRow)]
    tasks = [row for row in result.rows if isinstance(row, TaskRow)]
    made = [
        *_overviews(texts, "perplexity, times the base model's", "ratio", ".3f"),
        *_overviews(texts, "share of the base model's first choices", "agreement", ".1%"),
        *([_task_means(tasks)] if tasks else []),
        *(_text_table(name, texts) for name in dict.fromkeys(row.subject for row in texts)),
        *(_task_table(name, tasks) for name in dict.fromkeys(row.subject for row in tasks)),
        _answers_table([row for row in result.rows if isinstance(row, AnswersRow)]),
        _kinds_table([row for row in result.rows if isinstance(row, KindRow)]),
    ]
    return [table for table in made if table.rows]


def _overviews(rows: Sequence[TextRow], title: str, field: str, spec: str) -> list[Table]:
    """A field of each set by method and by layers asked to be skipped."""
    return [
        _pivot(
            f"{name}: {title}, by mean layers to skip",
            {
                (r.method, r.asked): format(getattr(r, field), spec)
                for r in rows
                if r.subject == name
            },
        )
        for name in dict.fromkeys(row.subject for row in rows)
    ]


def _task_means(rows: Sequence[TaskRow]) -> Table:
    """Mean acc_norm over the tasks."""
    found: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        found.setdefault((row.method, row.asked), []).append(row.acc_norm)
    values = {key: f"{sum(accs) / len(accs):.1%}" for key, accs in found.items()}
    return _pivot("mean acc_norm of the tasks, by mean layers to skip", values)


def _pivot(title: str, values: dict[tuple[str, float], str]) -> Table:
    numbers = sorted({asked for _, asked in values})
    methods = dict.fromkeys(method for method, _ in values)
    return Table(
        title,
        ["method", *(f"{number:g}" for number in numbers)],
        [[method, *(values.get((method, n), "-") for n in numbers)] for method in methods],
    )


def _text_table(name: str, rows: Sequence[TextRow]) -> Table:
    own = [row for row in rows if row.subject == name]
    count = own[0].predictions
    return Table(
        f"{name}, {count} predictions",
        ["method", "asked", "skipped", "perplexity", "x base", "± %", "first choice", "MB/token"],
        [
            [
                *_point(row),
                f"{row.perplexity:.2f}",
                f"{row.ratio:.3f}",
                f"{100 * row.nats_stderr:.1f}",
                f"{row.agreement:.1%}",
                f"{row.bytes_per_token / 1e6:.1f}",
            ]
            for row in own
        ],
    )


def _task_table(name: str, rows: Sequence[TaskRow]) -> Table:
    own = [row for row in rows if row.subject == name]
    return Table(
        f"{name}, {own[0].questions} questions",
        ["method", "asked", "skipped", "acc", "±", "acc_norm", "±", "MB/token"],
        [
            [
                *_point(row),
                f"{row.acc:.1%}",
                f"{row.acc_stderr:.1%}",
                f"{row.acc_norm:.1%}",
                f"{row.acc_norm_stderr:.1%}",
                f"{row.bytes_per_token / 1e6:.1f}",
            ]
            for row in own
        ],
    )


def _answers_table(rows: Sequence[AnswersRow]) -> Table:
    return Table(
        f"greedy answers to {rows[0].answers if rows else 0} prompts",
        ["method", "asked", "skipped", "first 32 tokens alike", "never end", "base never end"],
        [
            [
                *_point(row),
                f"{row.identical:.1%}",
                f"{row.never_ending:.1%}",
                f"{row.base_never_ending:.1%}",
            ]
            for row in rows
        ],
    )


def _kinds_table(rows: Sequence[KindRow]) -> Table:
    return Table(
        "layers used by kind of task",
        ["method", "asked", "kind", "in prompts", "in answers", "±", "answer tokens"],
        [
            [
                row.method,
                f"{row.asked:g}",
                row.subject,
                f"{row.prompt_layers:.2f}",
                f"{row.answer_layers:.2f}",
                f"{row.answer_stderr:.2f}",
                str(row.answer_tokens),
            ]
            for row in rows
        ],
    )


def _point(row: Row) -> list[str]:
    return [row.method, f"{row.asked:g}", f"{row.skipped:.2f}"]


def markdown(table: Table) -> str:
    """A Markdown table under its title."""
    rule = ["---"] * table.names + ["--:"] * (len(table.headings) - table.names)
    lines = [table.headings, rule, *table.rows]
    return f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rich_table(table: Table) -> RichTable:
    """A table for a rich console."""
    from rich.table import Table as RichTable

    made = RichTable(title=table.title, title_justify="left")
    for number, heading in enumerate(table.headings):
        made.add_column(heading, justify="left" if number < table.names else "right")
    for row in table.rows:
        made.add_row(*row)
    return made


def report_text(result: EvalResult) -> str:
    """The whole report in Markdown."""
    return "\n\n".join([_preamble(result.header), *map(markdown, tables(result)), _notes()])


def _preamble(header: dict[str, Any]) -> str:
    machine, options = header["machine"], header["options"]
    digest = header["models"][header["model"]]
    routed = header["routing_layers"]
    return (
        f"# Quality against layers skipped\n\n"
        f"{header['model']} (sha256 {digest[:16]}) in {header['dtype']}, {len(routed)} of {header['num_layers']} "
        f"layers routed, adapters {header['adapter_dim']} wide"
        f"{'' if header['routers_trained'] else ', routers seeded and not trained'}.\n"
        f"Texts in windows of {options['window']} tokens; of conversations what is answered counts, questions and the "
        f"template's tokens do not. Thresholds of greedy answers and kinds of task and block influence from "
        f"{header['calibration_tokens']} tokens of {header['calibrated_on']}; thresholds of each set of texts and each "
        f"task from its own: {_calibrated_each(header)}.\n"
        f"On {machine['cpu']}, {machine['cores']} cores ({header['isa']}), {machine['memory_gb']} GB, "
        f"{machine['system']}. Command: `{header['command']}`; commit {machine['commit']}; "
        f"{', '.join(f'{name} {version}' for name, version in machine['versions'].items())}."
    )


def _calibrated_each(header: dict[str, Any]) -> str:
    return "; ".join(
        f"{each['subject']}, {each['tokens']} tokens of {each['source']}"
        for each in header["calibrated_each"]
    )


def _notes() -> str:
    return (
        "Methods: `base`, every layer run; `flexidepth`, the model's own routing, its thresholds moved together on "
        "the logit scale until calibration text skips so many layers, for each set of texts and each task its own; "
        "`dial`, its stored calibration asked for so many, as users do, whatever the text; "
        "`static-adapters`, the same routed layers skipped for every token, those without which that calibration text "
        "does best (found one after the other), and `random-adapters`, that many of them drawn anew for each token, "
        "both with the trained adapters; "
        "`random`, that many of the routed layers skipped at random by each token, no adapters; `shortgpt`, the layers "
        "of lowest block influence dropped for every token, no adapters, and `shortgpt-routed` the same among the "
        "routed layers.\n"
        "`skipped` is the mean measured on the very tokens of the row. MB/token are the weights that decoding a token "
        "reads with so many layers skipped, adapters and routers included. ± % is the standard error of the "
        "perplexity's ratio, in per cent of it, as if tokens were independent. Tasks are asked as lm-eval does, but "
        "the text of a choice is compared where a question lists its choices by letter."
    )
