"""What a check of the CUDA engine found, as tables and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flexidepth.plots import new_figure
from flexidepth_ext.cuda_choice import PassChoice, PassForm

from .engine_check import EngineCheck
from .engine_peers import PeerRow
from .engine_timing import DecodeRow, PrefetchRow, PromptRow
from .predictions import Beside, span
from .targets import target_lines, targets


@dataclass
class EngineReport:
    """Of one model; overlap: whether kernels began while those before them ended. persistent: whether a decoding pass
    was one kernel. choices: times of a pass in each form, and what an engine that is free to choose takes."""

    model: str
    overlap: bool
    routed: int
    persistent: bool = False
    decode: list[DecodeRow] = field(default_factory=list)
    prefetch: list[PrefetchRow] = field(default_factory=list)
    prompts: list[PromptRow] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    choices: list[PassChoice] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what did not fit the memory, or stopped
    said: str = ""  # what stopped it, if something did

    @property
    def title(self) -> str:
        """The model, and what is particular about how it was run."""
        form = ", one persistent kernel" if self.persistent else ""
        return f"{self.model}{', kernels overlap' if self.overlap else ''}{form}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.model,
            "overlap": self.overlap,
            "routed": self.routed,
            "persistent": self.persistent,
            "decode": [row.to_dict() for row in self.decode],
            "prefetch": [row.to_dict() for row in self.prefetch],
            "prompts": [row.to_dict() for row in self.prompts],
            "peers": [row.to_dict() for row in self.peers],
            "choices": [choice.to_dict() for choice in self.choices],
            "targets": [target.to_dict() for target in targets(self)],
            "left_out": self.left_out,
            "said": self.said,
        }


def check_lines(checks: Sequence[EngineCheck]) -> list[str]:
    """A table of the checks."""
    lines = [
        "## Engine against float32 on the same decisions",
        "",
        "| model | type | error, prompt | error, token by token | torch's error | decisions alike | graphs' tokens "
        "| persistent pass | kernels overlap | |",
        "|---|---|--:|--:|--:|--:|---|---|---|---|",
    ]
    overlap = {True: "same tokens and bits", False: "DIFFER", None: "not on this device"}
    bits = {True: "same bits", False: "OTHER BITS", None: "left out"}
    for c in checks:
        if c.said:
            word = "left out" if c.ok is None else "FAILED"
            lines.append(f"| {c.model} | {c.dtype} | | | | | | | {c.said} | {word} |")
            continue
        lines.append(
            f"| {c.model} | {c.dtype} | {c.prompt_error:.4f} | {c.token_error:.4f} | {c.torch_error:.4f} "
            f"| {c.agreement:.2%} | {'alike' if c.same_tokens else 'DIFFER'} "
            f"| {bits[c.same_bits]} | {overlap[c.overlap]} "
            f"| {'ok' if c.ok else 'FAILED'} |"
        )
    return lines


def engine_lines(report: EngineReport) -> list[str]:
    """Tables of one model."""
    lines = ["", f"## {report.title}", ""]
    if report.said:
        lines += [report.said, ""]
    lines += [
        "| batch | context | layers skipped | ms | p90 | tok/s | GB | of copy | x dense | ideal | of ideal |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in report.decode:
        lines.append(
            f"| {r.batch} | {r.context} | {_skipped(r.skipped)} | {r.ms:.3f} | {r.ms_p90:.3f} "
            f"| {r.tokens_per_second:.1f} | {r.gigabytes:.3f} | {r.share:.0%} | {r.speedup:.3f} | {r.ideal:.3f} "
            f"| {r.speedup / r.ideal:.3f} |"
        )
    for peer in report.peers:
        lines.append(
            f"| 1 | {peer.context} | {_peer_name(peer)} | "
            + (f"{peer.ms:.3f} | | {1e3 / peer.ms:.1f}" if peer.ms else f"{peer.said} | |")
            + " | | | | | |"
        )
    lines += [f"\nLeft out: {what}" for what in report.left_out]
    lines += _prefetch_lines(report.prefetch)
    lines += _choice_lines(report.choices)
    if report.prompts:
        lines += [
            "",
            "| prompt | share skipped | s | tok/s | TFLOP/s | x dense | ideal (FLOP) |",
            "|--:|--:|--:|--:|--:|--:|--:|",
        ]
    for p in report.prompts:
        share = "dense" if p.share is None else f"{p.share:.0%}"
        lines.append(
            f"| {p.tokens} | {share} | {p.seconds:.4f} | {p.tokens_per_second:.0f} | {p.teraflops:.1f} "
            f"| {p.speedup:.3f} | {p.ideal:.3f} |"
        )
    return lines + target_lines(targets(report))


def prediction_lines(rows: Sequence[Beside]) -> list[str]:
    """A table of predictions beside what was measured; nothing where there are none."""
    if not rows:
        return []
    lines = [
        "",
        "| batch 1, context | layers skipped | assumed | ms, predicted | ms, measured | measured / predicted |",
        "|--:|--:|---|--:|--:|--:|",
    ]
    for r in rows:
        ratio = r.measured_ms / r.ms_high, r.measured_ms / r.ms_low
        lines.append(
            f"| {r.context} | {_skipped(r.skipped)} | {r.assumed} | {span((r.ms_low, r.ms_high), 3)} "
            f"| {r.measured_ms:.3f} | {span(ratio, 2)} |"
        )
    return lines


def _prefetch_lines(rows: Sequence[PrefetchRow]) -> list[str]:
    """Milliseconds of a step: a line an amount, a column a number of layers skipped."""
    if not rows:
        return []
    skips = list(dict.fromkeys(row.skipped for row in rows))
    lines = [
        "",
        f"Weights of a routed layer brought closer before its decision (KiB), ms a step at batch 1, context "
        f"{rows[0].context}:",
        "",
        "| KiB | " + " | ".join(f"{skipped} skipped" for skipped in skips) + " |",
        "|--:|" + "--:|" * len(skips),
    ]
    for kb in dict.fromkeys(row.kb for row in rows):
        times = (f"{row.ms:.3f}" for row in rows if row.kb == kb)
        lines.append(f"| {kb} | {' | '.join(times)} |")
    return lines


def _peer_name(peer: PeerRow) -> str:
    """With what is to be known of its time."""
    return f"{peer.name} ({peer.said})" if peer.ms and peer.said else peer.name


def _choice_lines(choices: Sequence[PassChoice]) -> list[str]:
    """Milliseconds of a pass in each form, or why there are none."""
    if not choices:
        return []
    forms = [form.value for form in PassForm]
    lines = [
        "",
        "| sequences | pages | routing | "
        + " | ".join(f"ms, {form}" for form in forms)
        + " | chosen |",
        "|--:|--:|---|" + "--:|" * len(forms) + "---|",
    ]
    for c in choices:
        cells = [
            f"{c.seconds[f] * 1e3:.3f}" if f in c.seconds else c.said.get(f, "") for f in forms
        ]
        lines.append(
            f"| {c.sequences} | {c.pages} | {c.routing} | {' | '.join(cells)} | {c.chosen.value} |"
        )
    return lines


def _skipped(skipped: int | None) -> str:
    return "dense" if skipped is None else str(skipped)


def engine_figure(reports: Sequence[EngineReport], title: str) -> Any:
    """Tokens per second at batch 1 against layers skipped, a line for each context with its ideal, and the peers."""
    drawn = [report for report in reports if report.decode]
    figure, axes = new_figure(7, 4.2 * max(1, len(drawn)), max(1, len(drawn)))
    for axis, report in zip(axes if len(drawn) > 1 else [axes], drawn, strict=False):
        alone = [row for row in report.decode if row.batch == 1]
        for context in dict.fromkeys(row.context for row in alone):
            own = [r for r in alone if r.context == context]
            (dense,) = (r.tokens_per_second for r in own if r.skipped is None)
            ours = [r for r in own if r.skipped is not None]
            numbers = [r.skipped for r in ours]
            (line,) = axis.plot(
                numbers, [r.tokens_per_second for r in ours], "o-", label=f"context {context}"
            )
            ideal = [dense * r.ideal for r in ours]
            axis.plot(numbers, ideal, "--", color=line.get_color(), label="ideal by bytes")
        for peer in report.peers:
            if peer.ms:
                axis.axhline(1e3 / peer.ms, linewidth=0.8, color="black")
                axis.annotate(_peer_name(peer), (0, 1e3 / peer.ms), fontsize=7, va="bottom")
        axis.set_xlabel(f"layers skipped per token (of {report.routed} routed ones)")
        axis.set_ylabel("tokens per second")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8)
        axis.set_title(f"{report.title}, {title}", fontsize=9)
    return figure
