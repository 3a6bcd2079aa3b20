"""Results on disk: written as they come, rendered, read again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from flexidepth.errors import CheckpointError, FlexiDepthError
from flexidepth.plain_json import json_text

from .breakdown import table_rows
from .report import csv_text, markdown, tables
from .results_folder import PARTIAL, check_folder, replace_results
from .rows import DECODE, DENSE, PROMPT, BenchRow, with_comparisons
from .run import BenchResult

KINDS = ("md", "csv", "json", "jsonl")
FORMAT_1 = "flexidepth-bench-1"  # of one model, type and depth
FORMAT_2 = "flexidepth-bench-2"  # of caches that the case before had filled


def render(result: BenchResult, kind: str) -> str:
    """The result as one of KINDS."""
    if kind == "json":
        return json_text(result.to_dict(), indent=1)
    if kind == "jsonl":
        return "\n".join(json_line(row) for row in result.rows)
    if kind == "csv":
        return csv_text(result.rows).rstrip()
    parts = [_preamble(result.header)]
    for title, rows, columns in tables(result.rows):
        parts += [f"### {title}", markdown(rows, columns)]
    return "\n\n".join([*parts, *_postscript(result.header)])


def json_line(row: BenchRow) -> str:
    """A row as one line of JSON."""
    return json_text(row.to_dict(), indent=None)


def _preamble(header: dict[str, Any]) -> str:
    machine = header["machine"]
    bandwidth = ", ".join(
        f"{v:.1f} GB/s with {k}" for k, v in header["read_bandwidth_gb_per_s"].items()
    )
    models = "; ".join(
        f"{name}: {sizes['routed_layers']} of {sizes['num_layers']} layers routed"
        for name, sizes in header["models"].items()
    )
    return (
        f"{models}. On {machine['cpu']}, {machine['cores']} cores ({header['isa']}), {machine['memory_gb']} GB, "
        f"{machine['system']}.\nBandwidth: {bandwidth or 'not measured'}. Load before and after: "
        f"{_load(header['load_before'])}, {_load(header['load_after'])}. Outside the timed steps of a block: "
        f"{header['harness_share']:.2%} of its time.\nCommand: `{header['command']}`; commit {machine['commit']}; "
        f"{', '.join(f'{k} {v}' for k, v in machine['versions'].items())}."
    )


def _load(value: float | None) -> str:
    return f"{value:.2f}" if value is not None and math.isfinite(value) else "not known"


def _postscript(header: dict[str, Any]) -> list[str]:
    parts = []
    if header["breakdown"]:
        heading, *cells = table_rows(header["breakdown"])
        lines = [heading, ["---", *["--:"] * (len(heading) - 1)], *cells]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(
            f"### Microseconds of a layer, one token\n\n{table}\n\nBy bytes: at the rate at which the dense pass "
            "reads; what a layer takes longer is its distance from the ideal line."
        )
    for name, a in header["accuracy"].items():
        parts.append(
            f"{name}, against the float32 reference on {a['tokens']} tokens: RMS error of the logits "
            f"{a['logits_rmse']:.4f} on the same decisions; every layer run {a['engine_dense_rmse']:.4f} "
            f"(transformers in the same type {a['torch_rmse']:.4f}), same first choice for "
            f"{a['top1_agreement']:.1%} of the tokens. Gates: {a['gate_agreement']:.3%} of {a['decisions']} "
            f"decisions equal, {a['gate_agreement_outside']:.3%} of those farther than {a['margin']} from the "
            f"threshold; largest difference {a['gate_max_error']:.4f}."
        )
    for name, m in header["memory"].items():
        if m is not None:
            parts.append(
                f"{name}: loading (files warm) {m['load_s']:.2f} s. Peak memory while loading and generating "
                f"{m['prompt_tokens']} + {m['new_tokens']} "
                f"tokens: {m['peak_bytes'] / 1e6:.0f} MB above the imports, "
                f"{m['peak_over_weights_and_cache']:.2f} x weights ({m['weight_bytes'] / 1e6:.0f} MB) and cache "
                f"({m['cache_bytes'] / 1e6:.0f} MB)."
            )
    return parts


class Partial:
    """Rows of a run that goes on, in `folder`, a line each as soon as they are measured; gone when it is over.

    Those of a run before it that was interrupted stay in front of them, and then the file stays.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file: IO[str] | None = None
        self._path: Path | None = None
        self.earlier = False  # whether the file was there
        if folder is not None:
            check_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / PARTIAL
            self.earlier = self._path.exists()
            self._file = self._path.open("a", encoding="utf-8")

    def keep(self, rows: Sequence[BenchRow]) -> None:
        """Write rows down."""
        if self._file is not None:
            self._file.writelines(json_line(row) + "\n" for row in rows)
            self._file.flush()

    def close(self) -> None:
        """Stop writing."""
        if self._file is not None:
            self._file.close()

    def discard(self) -> None:
        """The rows of this run are elsewhere now."""
        if self._path is not None and not self.earlier:
            self._path.unlink(missing_ok=True)


def write_results(result: BenchResult, directory: Path) -> list[Path]:
    """JSON with every sample, a JSON line for each row, CSV, Markdown, and plots where matplotlib is installed: all of
    them or none.

    SaveError where the directory cannot be written to. See `replace_results` for what becomes of older results.
    """

    def write(folder: Path) -> None:
        for kind in KINDS:
            (folder / f"bench.{kind}").write_text(render(result, kind) + "\n", encoding="utf-8")
        from flexidepth.plots import save_figure

        from .figures import figures

        # Without matplotlib the figures are still in the JSON; `flexidepth bench plot` draws them later.
        with suppress(FlexiDepthError):
            for name, figure in figures(LoadedResult.of(result)).items():
                save_figure(figure, folder / f"{name}.svg")

    return replace_results(directory, write)


@dataclass(frozen=True)
class LoadedResult:
    """A result read from a file, of this format or of those before it."""

    format: str
    rows: list[BenchRow]
    machine: dict[str, Any]
    models: dict[str, dict[str, int]]
    breakdown: list[dict[str, Any]]
    commit: str
    accuracy: dict[str, Any]
    memory: dict[str, Any]

    @classmethod
    def of(cls, result: BenchResult) -> LoadedResult:
        """As if it had been written and read."""
        return _loaded(result.to_dict())


def read_results(path: Path) -> LoadedResult:
    """A bench.json; CheckpointError where it is not one, OSError where it cannot be read."""
    source = path / "bench.json" if path.is_dir() else path
    text = source.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
        return _loaded(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"bench: {source} is no result of a benchmark (write one with bench --output-dir): {error!r}"
        ) from error


def _loaded(content: dict[str, Any]) -> LoadedResult:
    machine = content["machine"]
    breakdown: list[dict[str, Any]] = []
    if content["format"] == FORMAT_1:
        sizes = {name: content[name] for name in ("num_layers", "routed_layers")}
        models = {content["model"]: sizes}
    else:
        models = content["models"]
        # The second format's knew nothing of what is outside layers.
        if content["format"] != FORMAT_2:
            breakdown = content["breakdown"]
    # The first format's were of its only model.
    measured = {} if content["format"] == FORMAT_1 else content
    return LoadedResult(
        content["format"],
        rows_of(content),
        machine,
        models,
        breakdown,
        machine["commit"],
        measured.get("accuracy", {}),
        measured.get("memory", {}),
    )


def rows_of(content: dict[str, Any]) -> list[BenchRow]:
    """The rows of a file's content, of either format; KeyError or TypeError where it is none."""
    if content["format"] != FORMAT_1:
        return [BenchRow.from_dict(row) for row in content["rows"]]
    old = [_row_1(content, row, DECODE) for row in content["decode"]]
    old += [_row_1(content, row, PROMPT) for row in content["prompt"]]
    groups = groupby(sorted(old, key=lambda row: row.kind), key=lambda row: row.group)
    return [row for _, group in groups for row in with_comparisons(list(group))]


def bandwidth_of(content: dict[str, Any]) -> dict[str, float]:
    """GB/s, by "2 threads" or a device."""
    found: dict[str, float] = content["read_bandwidth_gb_per_s"]
    return {f"{k} threads": v for k, v in found.items()} if content["format"] == FORMAT_1 else found


def _row_1(content: dict[str, Any], row: dict[str, Any], kind: str) -> BenchRow:
    """A row of the first format, which had one model, type and depth."""
    decode = kind == DECODE
    skipped = row["skipped" if decode else "skip_share"]
    if not decode and skipped is not None:
        skipped = round(skipped * content["routed_layers"])
    peer = skipped is None and row["name"] != DENSE
    ms = row["ms_median"] if decode else row["s_median"] * 1e3
    test = f"tg{len(row['samples'])} @ d{content['depth']}" if decode else f"pp{row['tokens']}"
    return BenchRow(
        content["model"],
        "cpu",
        content["dtype"],
        row["threads"],
        1,
        kind,
        test,
        row["name"],
        peer=peer,
        skip_asked=skipped,
        skip_got=skipped,
        ms_median=ms,
        ms_p99=row.get("ms_p99"),
        tps_mean=row.get("tps_mean" if decode else "tps"),
        tps_std=row.get("tps_std"),
        work=row.get("gb_per_s" if decode else "gflop_per_s"),
        ideal=row["ideal"],
        samples=row["samples"],
    )
