"""flexidepth bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .common import command_errors, say
from .options import Json, PreferHub

_RUN = "run"
_HELP = """Tokens per second against layers skipped, beside our dense pass, the limit and the peers.

Prompt (pp) and decode (tg) are measured apart, all cases in turn in one run. Options with commas make a
matrix. MODEL: checkpoints, or shapes with random weights: random:smollm2-135m, random:qwen2.5-0.5b,
random:llama-3.2-1b, random:llama-3-8b.

Also: flexidepth bench ops (each op alone), bench compare A B (slower than before?), bench plot RESULT.

Example: flexidepth bench smollm2-135m --threads 1,2 --skip all --peers --output-dir results
"""
_COMPARE = """Compare two results of bench; exit code 1 where a row got slower by more than the noise of both.

What the memory did meanwhile (mere reads of as many bytes, in both results) is taken off. Results of different
machines are compared by their speed over our own dense pass.

Example: flexidepth bench compare bench/results/intel-xeon-amx-2-cores results
"""
_PLOT = """Draw a result of bench: decode, prompt or breakdown, as PNG or SVG.

Example: flexidepth bench plot results/bench.json --figure breakdown -o breakdown.svg
"""
_OPS = """Time each op alone at the shapes of a model: microseconds, bytes, share of the bandwidth.

Weights are cold: as many copies take turns as no cache holds.

Example: flexidepth bench ops --shape smollm2-135m --rows 1,8,64,512
"""


class _DefaultsToRun(TyperGroup):
    """`bench MODEL` means `bench run MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [_RUN, *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(cls=_DefaultsToRun)
    group.command(_RUN, help=_HELP)(bench)
    group.command("compare", help=_COMPARE)(compare)
    group.command("plot", help=_PLOT)(plot)
    group.command("ops", help=_OPS)(ops)
    app.add_typer(group, name="bench", help=_HELP)


def _numbers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{name} {text!r}: wanted numbers separated by commas") from None


@command_errors
def bench(
    model: Annotated[str, typer.Argument(help="One or more, with commas.")] = "smollm2-135m",
    device: Annotated[str, typer.Option(help="cpu, cuda, or both with a comma.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bf16, f16 (cuda), f32; with commas.")] = "auto",
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", help="1,2 and so on; default: all.")
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", "-b", help="Sequences that decode side by side: 1,4.")
    ] = "1",
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Prompt lengths (pp): 512,2048; 0 = none.")
    ] = "512",
    steps: Annotated[
        int,
        typer.Option(
            "--gen",
            "-n",
            help="Decode steps timed per case (tg), spread over the rounds; 0 = none.",
        ),
    ] = 128,
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens in the cache before decoding: 128,2048.")
    ] = "128",
    skip: Annotated[
        str,
        typer.Option(help="Layers skipped per token: 0,4,8, or all of these numbers, or quarters."),
    ] = "quarters",
    shares: Annotated[
        str, typer.Option(help="Per cent of the routed layers that prompt tokens skip.")
    ] = "0,50,100",
    routing: Annotated[
        str,
        typer.Option(
            help="random layers for each token, fixed ones, the model's own (calibrated), or a file of "
            "generate --routing-out to replay."
        ),
    ] = "random",
    peers: Annotated[
        bool, typer.Option("--peers", help="Time every peer that is installed in the same run.")
    ] = False,
    peer: Annotated[list[str] | None, typer.Option(help="Time this peer; may be repeated.")] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Also compare with the float32 reference.")
    ] = False,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Also say where the time of a layer goes (CPU).")
    ] = False,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory, in a process of its own.")
    ] = True,
    rounds: Annotated[int, typer.Option(help="Turns through all cases.")] = 8,
    prefer_hub: PreferHub = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="md, csv, json or jsonl on standard output.")
    ] = "md",
    as_json: Json = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write JSON, Markdown, CSV and plots here.")
    ] = None,
) -> None:
    from ..bench.options import BenchOptions
    from ..bench.report import markdown, tables
    from ..bench.results_file import KINDS, Partial, json_line, render, write_results
    from ..bench.run import run_bench
    from ..errors import ValueOutOfRangeError

    kind = "json" if as_json else output
    if kind not in KINDS:
        raise typer.BadParameter(f"--output {output!r}: wanted md, csv, json or jsonl")
    arguments: dict[str, Any] = {
        "models": model.split(","),
        "devices": device.split(","),
        "dtypes": dtype.split(","),
        "threads": None if threads is None else _numbers(threads, "--threads"),
        "batches": _numbers(batch, "--batch"),
        "prompts": _numbers(prompt, "--prompt"),
        "steps": steps,
        "depths": _numbers(depth, "--depth"),
        "skips": skip if skip in ("all", "quarters") else _numbers(skip, "--skip"),
        "shares": [n / 100 for n in _numbers(shares, "--shares")],
        "routing": routing,
        "rounds": rounds,
        "peers": ["all"] if peers else list(peer or ()),
        "accuracy": accuracy,
        "memory": memory,
        "breakdown": breakdown,
        "prefer_hub": prefer_hub,
    }
    try:
        options = BenchOptions(**arguments)
    except ValueOutOfRangeError as error:
        raise typer.BadParameter(str(error)) from None
    partial = Partial(output_dir)

    kept: list[Any] = []

    def keep(rows: Any) -> None:
        partial.keep(rows)
        kept.extend(rows)
        if kind == "jsonl":  # a row at a time, for whoever reads along
            for row in rows:
                print(json_line(row), flush=True)

    try:
        result = run_bench(options, say, keep)
    except BaseException:
        if kind != "jsonl":
            print("\n\n".join(markdown(group, columns) for _, group, columns in tables(kept)))
        raise
    finally:
        partial.close()
    if kind != "jsonl":
        print(render(result, kind))
    if output_dir is not None:
        for path in write_results(result, output_dir):
            say(f"wrote {path}")
        partial.discard()


@command_errors
def compare(
    before: Annotated[Path, typer.Argument(help="A bench.json, or the folder it is in.")],
    after: Annotated[Path, typer.Argument(help="The same of the newer run.")],
) -> None:
    from ..bench.compare import CHANGE_COLUMNS
    from ..bench.compare import compare as compare_results
    from ..bench.report import table
    from ..bench.results_file import read_results

    results = read_results(before), read_results(after)
    found = compare_results(*results)
    if results[0].format != results[1].format:
        say("the results were timed by different versions of the benchmark")
    if found.ratios:
        say("different machines: compared is the time over that of the dense pass")
    if not found.changes:
        raise typer.BadParameter("the two results have no row of ours in common")
    print(table(found.changes, CHANGE_COLUMNS))
    for name in found.missing:
        say(f"only in {before}: {name}")
    if found.slower:
        say(f"{len(found.slower)} of {len(found.changes)} rows got slower by more than noise")
        raise typer.Exit(1)


@command_errors
def plot(
    result: Annotated[Path, typer.Argument(help="A bench.json, or the folder it is in.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write: .png or .svg.")],
    figure: Annotated[str, typer.Option(help="decode, prompt or breakdown.")] = "decode",
) -> None:
    from ..bench.figures import breakdown_figure, decode_figure, prompt_figure
    from ..bench.results_file import read_results
    from ..plots import check_figure_path, save_figure

    kinds = {"decode": decode_figure, "prompt": prompt_figure, "breakdown": breakdown_figure}
    if figure not in kinds:
        raise typer.BadParameter(f"--figure {figure!r}: wanted {', '.join(kinds)}")
    check_figure_path(out)
    print(save_figure(kinds[figure](read_results(result)), out))


@command_errors
def ops(
    shape: Annotated[str, typer.Option(help="Of a model; see bench run --help.")] = "smollm2-135m",
    rows: Annotated[str, typer.Option(help="Tokens at a time.")] = "1,8,64,512",
    dtype: Annotated[str, typer.Option(help="bf16 or f32.")] = "bf16",
    depth: Annotated[int, typer.Option("--depth", "-d", min=0, help="Tokens in the cache.")] = 128,
    threads: Annotated[
        int | None, typer.Option("--threads", "-t", min=1, help="Default: all.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each op.")] = 20,
    as_json: Json = False,
    output_dir: Annotated[
        Path | None, typer.Option(help="Also write ops.json and ops.md here.")
    ] = None,
) -> None:
    from flexidepth_ext import _C

    from ..bench.bandwidth import read_bandwidth
    from ..bench.models import NAMES, model_config
    from ..bench.ops import measure_ops
    from ..bench.ops_file import ops_json, ops_markdown, write_ops
    from ..bench.options import DTYPES
    from ..bench.results_folder import check_folder

    if shape not in NAMES:
        raise typer.BadParameter(f"--shape {shape!r}: wanted one of {', '.join(NAMES)}")
    counts = _numbers(rows, "--rows")
    if not all(count >= 1 for count in counts):
        raise typer.BadParameter(f"--rows {rows!r}: wanted numbers from 1 on")
    wanted = {name: d for name, d in DTYPES.items() if name != "float16" and name != "f16"}
    if dtype not in wanted:
        raise typer.BadParameter(f"--dtype {dtype!r}: wanted one of {', '.join(wanted)}")
    used = threads or _C.available_threads()
    if output_dir is not None:
        check_folder(output_dir)
    bandwidth = read_bandwidth(used)
    found = measure_ops(
        model_config(shape),
        wanted[dtype],
        counts,
        depth=depth,
        threads=used,
        bandwidth=bandwidth,
        repeats=repeats,
        notify=say,
    )
    header = {
        "shape": shape,
        "dtype": str(wanted[dtype]).removeprefix("torch."),
        "threads": used,
        "depth": depth,
        "read_bandwidth_gb_per_s": bandwidth,
    }
    print(ops_json(header, found) if as_json else ops_markdown(header, found))
    if output_dir is not None:
        for path in write_ops(header, found, output_dir):
            say(f"wrote {path}")
