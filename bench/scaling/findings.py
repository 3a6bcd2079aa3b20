"""What the study says, in sentences whose numbers come out of its JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .study import half

_GPUS = ("RTX 4090", "H100 SXM", "H200")


def findings(study: dict[str, Any]) -> str:
    """A Markdown list; study: the values of `make_study`, as its JSON has them."""
    parts = (_when_it_pays, _latency, _head, _quantisation, _contexts, _prompts, _batches)
    return "\n".join(f"- {part(study)}" for part in parts)


def decode_row(study: dict[str, Any], device: str, model: str, precision: str) -> dict[str, Any]:
    """The row of the study."""
    wanted = (device, model, precision)
    rows = study["decode"]
    row: dict[str, Any] = next(
        r for r in rows if (r["device"], r["model"], r["precision"]) == wanted
    )
    return row


def _when_it_pays(study: dict[str, Any]) -> str:
    fitting = [r for r in study["decode"] if r["fits"] and "head" not in r["precision"]]
    laptop = [r["break_even"] for r in fitting if r["device"] == "laptop CPU"]
    large = [r for r in fitting if r["model"] in ("llama-3-8b", "llama-3-70b")]
    eight = [
        r["break_even"] for r in large if (r["model"], r["precision"]) == ("llama-3-8b", "bf16")
    ]
    most = max(large, key=lambda r: r["break_even"])
    return (
        "**When it pays.** Routers and their phases must be earned first. On the laptop that takes "
        f"{_span(laptop)} skipped layers a token, whatever fits; for the 8B model in bf16 {_span(eight)} on the "
        f"four devices; for 8B and 70B in any type at most {most['break_even']:.1f} "
        f"({most['model']} in {most['precision']} on {most['device']})."
    )


def _latency(study: dict[str, Any]) -> str:
    small = [decode_row(study, device, "smollm2-135m", "bf16") for device in _GPUS]
    one = [decode_row(study, device, "llama-3.2-1b", "bf16") for device in _GPUS]
    eight = next(a for a in study["assumptions"] if a["model"] == "llama-3-8b")
    (low, high), (fast, slow) = eight["shares"], eight["phases_us"]
    return (
        "**Latency is the time of small models on GPUs**, with a kernel for each phase as this package has them: "
        f"{_span(100 * r['waiting_share'] for r in small)} % of a dense token of the 135M model in bf16 is waiting "
        f"between phases, {_span(100 * r['waiting_share'] for r in one)} % of the 1B model's. A skipped layer saves "
        "little of that, and kernels that find no row still cost their launch: the 135M model comes to "
        f"x{_span((half(r['speedup']) for r in small), 2)} at half of its routed layers and to "
        f"x{_span((r['speedup'][-1] for r in small), 2)} at all of them. There fewer phases come first, skipping "
        f"second. The 8B model on an H100 comes to x{eight['lowest']:.2f} to x{eight['highest']:.2f} at half for "
        f"any share of the bandwidth from {low:.0%} to {high:.0%} and {fast:g} to {slow:g} us a phase."
    )


def _head(study: dict[str, Any]) -> str:
    one, large = (
        next(m for m in study["models"] if m["model"] == name)["head_share"]
        for name in ("llama-3.2-1b", "llama-3-70b")
    )
    whole, kept = (
        half(decode_row(study, "laptop CPU", "llama-3.2-1b", precision)["ideal"])
        for precision in ("int4", "int4, head bf16")
    )
    return (
        f"**The LM head** is read whatever is skipped: {one['bf16']:.0%} of a dense token of the 1B model, "
        f"{large['bf16']:.1%} of the 70B model's. Left in bf16 beside int4 layers it becomes "
        f"{one['int4, head bf16']:.0%} and {large['int4, head bf16']:.1%}, and the 1B model's limit at half falls "
        f"from x{whole:.2f} to x{kept:.2f}: a small model with a large vocabulary needs its head quantised too."
    )


def _quantisation(study: dict[str, Any]) -> str:
    def change(device: str) -> str:
        rows = (decode_row(study, device, "llama-3-8b", name) for name in ("bf16", "int4"))
        return " to ".join(f"x{half(row['speedup']):.2f}" for row in rows)

    return (
        "**Quantisation** shrinks both paths alike, but neither float32 routers nor latencies. From bf16 to int4 "
        f"the 8B model's speed-up at half goes from {change('laptop CPU')} on the laptop and from "
        f"{change('H100 SXM')} on an H100, on top of what int4 itself gains; routers in bf16 would win back "
        "what the laptop loses."
    )


def _contexts(study: dict[str, Any]) -> str:
    own = [c for c in study["contexts"] if (c["model"], c["precision"]) == ("llama-3-8b", "bf16")]
    first, last = own[0], own[-1]
    return (
        "**Long contexts** favour skipping, because a skipped layer's keys and values are not read either: the 8B "
        f"model's limit at half rises from x{first['ideal']:.2f} with {first['context']:,} tokens in the cache to "
        f"x{last['ideal']:.2f} with {last['context']:,}, where the cache is {last['cache_share']:.0%} of what a dense "
        "token reads."
    )


def _prompts(study: dict[str, Any]) -> str:
    rows = [p["ideal"] for p in study["prompts"] if p["share"] == 0.5]
    pairs = [
        (value, p["ideal"])
        for p in study["prompts"]
        for value in p["speedup"].values()
        if value is not None
    ]
    bound = all(abs(value / ideal - 1) < 1e-9 for value, ideal in pairs)
    where = "wherever the model fits" if bound else "where weights do not bind"
    text = (
        f"**Prompts** of {study['prompt']} tokens follow arithmetic {where}: x{_span(rows, 2)} with half of the "
        "routed layers skipped, whatever the type of the weights."
    )
    errors = study["measured"]["pooled"]["prompt"].get("fitted")
    if errors is None or not errors["points"]:
        return text
    word = "slower" if errors["bias"] < 0 else "faster"
    return f"{text} The measured ones are {abs(errors['bias']):.1%} {word} than that in the mean."


def _batches(study: dict[str, Any]) -> str:
    (level,) = list(study["recording"]["levels"])[-1:]
    own = {
        (b["routing"], b["rows"]): b["ideal"]["llama-3-8b"]
        for b in study["batches"]
        if b["level"] == level
    }
    sizes = sorted({rows for _, rows in own})
    recorded = ", ".join(f"x{own['recorded', size]:.2f}" for size in sizes)
    alike = ", ".join(f"x{own['alike', size]:.2f}" for size in sizes)
    return (
        "**Batches** lose the gain quickly, because a layer is read when any row runs it, and its adapter when any "
        f"row skips it. The 8B model's limit, routed as recorded at {level}, for "
        f"{', '.join(map(str, sizes))} sequences: {recorded}; if all layers were skipped alike and independently: "
        f"{alike}. What helps is that some layers are skipped more often than others; beyond that different "
        "sequences do not skip together. Batches need a router that is asked to agree, or rows grouped by what "
        "they skip."
    )


def _span(values: Iterable[float], digits: int | None = None) -> str:
    """The lowest and the highest of some values, once where they read alike."""
    numbers = sorted(values)
    texts = [_number(number, digits) for number in (numbers[0], numbers[-1])]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _number(number: float, digits: int | None) -> str:
    if digits is None:
        digits = 0 if number >= 10 else 1
    return f"{number:.{digits}f}"
