"""A whole benchmark run: cases, peers, machine, results."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexidepth.checkpoints import Checkpoint, open_checkpoint
from flexidepth.plain_json import json_text
from flexidepth_ext import _C
from flexidepth_ext.engine import Engine

from .bandwidth import read_bandwidth
from .decode import DecodeRow, measure_decode
from .machine import describe_machine
from .options import DTYPES, SPARE, BenchOptions
from .prompt import PromptRow, measure_prompt
from .report import DECODE_COLUMNS, PROMPT_COLUMNS, Columns, csv_text, markdown
from .results_folder import replace_results
from .timing import Case, load_average

FORMAT = "flexidepth-bench-1"
_PROMPT_ROUNDS = 5
Notify = Callable[[str], None]


@dataclass(frozen=True)
class BenchResult:
    """Rows and everything needed to rerun them."""

    header: dict[str, Any]
    decode: list[DecodeRow]
    prompt: list[PromptRow]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every sample included."""
        return {
            **self.header,
            "decode": [row.to_dict() for row in self.decode],
            "prompt": [row.to_dict() for row in self.prompt],
        }


def run_bench(options: BenchOptions, notify: Notify) -> BenchResult:
    """Measure; `notify` gets a line of text for each stage."""
    dtype = DTYPES[options.dtype]
    checkpoint = open_checkpoint(options.model, prefer_hub=options.prefer_hub, notify=notify)
    config = checkpoint.config
    skips = options.check_fits(config)
    load_before = load_average()
    if load_before > 0.5:
        notify(f"warning: the machine is busy (load {load_before:.2f}); figures will be noisy")
    peers = _Peers(checkpoint, options, dtype, notify) if options.peers else None
    decode: list[DecodeRow] = []
    prompt: list[PromptRow] = []
    bandwidth = {}
    accuracy = None
    for threads in options.threads or [_C.available_threads()]:
        bandwidth[threads] = read_bandwidth(threads)
        engine = Engine(config, checkpoint.tensors(), dtype=dtype, num_threads=threads)
        if options.steps:
            notify(f"decode, {threads} threads, {len(skips) + 1} cases")
            decode += measure_decode(
                engine,
                skips,
                peers=peers.decode(threads) if peers else (),
                context=options.depth,
                rounds=options.rounds,
                steps=options.steps,
            )
        if options.prompt:
            notify(f"prompt of {options.prompt}, {threads} threads")
            prompt += measure_prompt(
                engine,
                options.prompt,
                options.shares,
                peers=peers.prompt(threads) if peers else (),
                rounds=_PROMPT_ROUNDS,
            )
        if options.accuracy and accuracy is None:
            notify("accuracy against the float32 reference")
            accuracy = _accuracy(checkpoint, engine)
        engine.close()
    header: dict[str, Any] = {
        "format": FORMAT,
        "model": options.model,
        "dtype": str(dtype).removeprefix("torch."),
        "num_layers": config.num_hidden_layers,
        "routed_layers": config.num_routed_layers,
        "depth": options.depth,
        "command": "flexidepth " + shlex.join(sys.argv[1:]),
        "machine": describe_machine(),
        "isa": _C.OpContext(1).isa,
        "load_before": load_before,
        "load_after": load_average(),
        "read_bandwidth_gb_per_s": bandwidth,
        "accuracy": accuracy,
        # by its path: the same file, and nothing is fetched again
        "memory": _memory(checkpoint.source, options.dtype),
    }
    return BenchResult(header, decode, prompt)


def _accuracy(checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
    from .accuracy import measure_accuracy

    return measure_accuracy(checkpoint, engine).to_dict()


def _memory(source: str, dtype: str) -> dict[str, Any] | None:
    from .memory import measure_memory

    return measure_memory(source, dtype)


class _Peers:
    """The peers that are installed, loaded once; one that cannot run is said and left out."""

    def __init__(
        self, checkpoint: Checkpoint, options: BenchOptions, dtype: torch.dtype, notify: Notify
    ) -> None:
        self.options, self.notify = options, notify
        from .peers import transformers_eager

        self.transformers = [
            transformers_eager.load(checkpoint, kind)
            for kind in dict.fromkeys((dtype, torch.float32))
        ]
        self.llama_file: Path | None = None
        base = checkpoint.base or checkpoint.source
        if dtype != torch.bfloat16 or not base.endswith(".gguf"):
            notify("llama.cpp is left out: it runs bfloat16 from a GGUF file")
            return
        try:
            from .peers import llama_cpp

            self.llama_file = llama_cpp.bf16_file(Path(base))
        except ImportError:
            notify(
                "llama.cpp is left out: pip install llama-cpp-python (or flexidepth[peers]) adds it"
            )

    def decode(self, threads: int) -> list[Case]:
        """One case per peer."""
        from .peers import llama_cpp, transformers_eager

        depth = self.options.depth
        cases = [
            transformers_eager.decode_case(model, depth, threads) for model in self.transformers
        ]
        if self.llama_file is not None:
            model = llama_cpp.load(self.llama_file, threads, depth + self.options.steps + SPARE)
            cases.append(llama_cpp.decode_case(model, depth))
        return cases

    def prompt(self, threads: int) -> list[Case]:
        """One case per peer."""
        from .peers import llama_cpp, transformers_eager

        tokens = self.options.prompt
        cases = [
            transformers_eager.prompt_case(model, tokens, threads) for model in self.transformers
        ]
        if self.llama_file is not None:
            model = llama_cpp.load(self.llama_file, threads, tokens)
            cases.append(llama_cpp.prompt_case(model, tokens))
        return cases


def render(result: BenchResult, kind: str) -> str:
    """The result as "md", "csv" or "json"."""
    if kind == "json":
        return json_text(result.to_dict(), indent=1)
    parts = []
    if result.decode:
        # llama-bench's words: tg = tokens generated, pp = prompt processed, d = depth of the cache.
        title = f"tg{len(result.decode[0].samples)} @ d{result.header['depth']}"
        parts.append(_table(result.decode, DECODE_COLUMNS, title, kind))
    if result.prompt:
        parts.append(_table(result.prompt, PROMPT_COLUMNS, f"pp{result.prompt[0].tokens}", kind))
    if kind == "md":
        parts.insert(0, _preamble(result.header))
        parts += _postscript(result.header)
    return "\n\n".join(parts)


def _table(rows: Sequence[Any], columns: Columns, title: str, kind: str) -> str:
    """The rows with `title` over their names."""
    (field, _, spec), *rest = columns
    titled = [(field, title, spec), *rest]
    return markdown(rows, titled) if kind == "md" else csv_text(rows, titled).rstrip()


def _preamble(header: dict[str, Any]) -> str:
    machine = header["machine"]
    bandwidth = ", ".join(
        f"{v:.1f} GB/s with {k} threads" for k, v in header["read_bandwidth_gb_per_s"].items()
    )
    return (
        f"{header['model']} in {header['dtype']} on {machine['cpu']}, {machine['cores']} cores "
        f"({header['isa']}), {machine['memory_gb']} GB, {machine['system']}; {header['routed_layers']} of "
        f"{header['num_layers']} layers routed, "
        f"{header['depth']} tokens in the cache.\nRead bandwidth: {bandwidth}. Load before and after: "
        f"{_load(header['load_before'])}, {_load(header['load_after'])}.\nCommand: `{header['command']}`; "
        f"commit {machine['commit']}; {', '.join(f'{k} {v}' for k, v in machine['versions'].items())}."
    )


def _load(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "not known"


def _postscript(header: dict[str, Any]) -> list[str]:
    parts = []
    if (a := header["accuracy"]) is not None:
        parts.append(
            f"Against the float32 reference on {a['tokens']} tokens: RMS error of the logits "
            f"{a['logits_rmse']:.4f} on the same decisions; every layer run {a['engine_dense_rmse']:.4f} "
            f"(transformers in the same type {a['torch_rmse']:.4f}), same first choice for "
            f"{a['top1_agreement']:.1%} of the tokens. Gates: {a['gate_agreement']:.3%} of {a['decisions']} "
            f"decisions equal, {a['gate_agreement_outside']:.3%} of those farther than {a['margin']} from the "
            f"threshold; largest difference {a['gate_max_error']:.4f}."
        )
    if (m := header["memory"]) is not None:
        parts.append(
            f"Loading (files warm): {m['load_s']:.2f} s. Peak memory while loading and generating "
            f"{m['prompt_tokens']} + {m['new_tokens']} "
            f"tokens: {m['peak_bytes'] / 1e6:.0f} MB above the imports, "
            f"{m['peak_over_weights_and_cache']:.2f} x weights ({m['weight_bytes'] / 1e6:.0f} MB) and cache "
            f"({m['cache_bytes'] / 1e6:.0f} MB)."
        )
    return parts


def write_results(result: BenchResult, directory: Path) -> list[Path]:
    """JSON with every sample, Markdown, and the plot where matplotlib is installed: all of them or none.

    SaveError where the directory cannot be written to. See `replace_results` for what becomes of older results.
    """

    def write(folder: Path) -> None:
        for name, kind in (("bench.json", "json"), ("bench.md", "md")):
            (folder / name).write_text(render(result, kind) + "\n", encoding="utf-8")
        if result.decode:
            from flexidepth.errors import FlexiDepthError
            from flexidepth.plots import save_figure, speed_figure

            # Without matplotlib the figures are still in the JSON; `flexidepth plot` draws them later.
            with suppress(FlexiDepthError):
                save_figure(speed_figure(result.to_dict()), folder / "decode.svg")

    return replace_results(directory, write)
