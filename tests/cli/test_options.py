"""Every option of every command is handed on: to the loader, to the generation, to the work behind it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from flexidepth import FlexiDepth, RoutingReport
from flexidepth.cli import app
from flexidepth.terminal import TokenPrinter
from tests.cli.conftest import Command

Calls = dict[str, dict[str, Any]]


class Stop(Exception):
    """Ends a command once its arguments are recorded."""


class StubTokenizer:
    """Has a chat template, whatever it says."""

    chat_template = "any"


class StubModel:
    """Stands in for a loaded model; every generation ends as soon as its arguments are known."""

    config = SimpleNamespace(
        num_hidden_layers=4,
        num_routed_layers=2,
        routing_layers=[2, 3],
        calibration=[{"layers_skipped": n, "thresholds": [0.5, 0.5]} for n in (0.5, 1.5)],
        skip_presets={"quality": 1.0},
    )
    tokenizer = StubTokenizer()
    routers_trained, source, base_source, max_length = True, "here", "here", 64

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __enter__(self) -> StubModel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompt: Any, **arguments: Any) -> None:
        self.calls["call"] = {"prompt": prompt, **arguments}
        raise Stop

    def stream(self, prompt: Any, **arguments: Any) -> Iterator[Any]:
        self.generate(prompt, **arguments)
        yield

    def chat(self, system: str | None, **arguments: Any) -> None:
        self.calls["call"] = {"system": system, **arguments}
        raise Stop


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """What the commands hand on, by receiver, argument by argument."""
    seen: Calls = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()  # for the command that changes a model where it lies
    (tmp_path / "m" / "config.json").write_text('{"model_type": "flexidepth"}')

    def record(target: str, receiver: str, result: Callable[[], Any]) -> None:
        module, _, name = target.rpartition(".")
        owner = __import__(module, fromlist=[name]) if module.islower() else FlexiDepth
        signature = inspect.signature(getattr(owner, name))

        def recorder(*arguments: Any, **options: Any) -> Any:
            seen[receiver] = dict(signature.bind(*arguments, **options).arguments)
            return result()

        monkeypatch.setattr(owner, name, recorder)

    def stop() -> None:
        raise Stop

    record("flexidepth.llm.FlexiDepth.from_pretrained", "load", lambda: StubModel(seen))
    record("flexidepth.checkpoints.open_checkpoint", "open", stop)
    record("flexidepth.checkpoints.convert", "convert", stop)
    record("flexidepth.checkpoints.merge", "merge", stop)
    record("flexidepth.training.documents.read_documents", "documents", list)
    record("flexidepth.training.calibration_text.token_sequences", "texts", list)
    record("flexidepth.training.calibration.calibrate", "calibrate", stop)
    record("flexidepth.training.command.changed_recipe", "recipe", lambda: None)
    record("flexidepth.training.command.train_recipe", "train", stop)
    record("flexidepth.bench.run.run_bench", "bench", stop)
    record("flexidepth.training.prompts.read_prompts", "prompts", list)
    record("flexidepth.training.self_distillation.distill", "distill", stop)
    record("flexidepth.training.made_tasks.make_tasks", "tasks", stop)
    record("flexidepth.evaluation.run.evaluate", "eval", stop)
    record("flexidepth.plots.routing_figure", "plot", stop)
    record("flexidepth.plots.save_figure", "save", stop)
    return seen


GENERATE, CHAT = ("generate", "m", "text"), ("chat", "m")
CONVERT, BENCH, DEMO, INSPECT = (
    ("convert", "m", "out"),
    ("bench", "m"),
    ("demo", "m"),
    ("inspect", "m"),
)
DISTILL = ("distill-data", "m", "--prompts", "p.jsonl", "--out", "o.jsonl")
MAKE_PROMPTS = ("make-prompts", "o.jsonl")
TRAIN = ("train", "paper", "--output-dir", "o")
MERGE, CALIBRATE = ("merge", "m", "out"), ("calibrate", "m", "--data", "a.txt")
EVAL = ("eval", "m", "--prose", "p")

LOADING = [
    (["--threads", "3"], "load.num_threads", 3),
    (["--prefer-hub"], "load.prefer_hub", True),
]
MODEL = [
    *LOADING,
    (["--dtype", "float32"], "load.dtype", "float32"),
    (["--device", "cpu"], "load.device", "cpu"),
    (["--max-length", "77"], "load.max_length", 77),
    (["--base-model", "b"], "load.base_model", "b"),
]
SAMPLING = [
    (["--max-new-tokens", "5"], "call.max_new_tokens", 5),
    (["--temperature", "0.3"], "call.temperature", 0.3),
    (["--top-k", "4"], "call.top_k", 4),
    (["--top-p", "0.25"], "call.top_p", 0.25),
    (["--min-p", "0.5"], "call.min_p", 0.5),
    (["--repetition-penalty", "1.25"], "call.repetition_penalty", 1.25),
    (["--stop-strings", "a", "--stop", "b"], "call.stop_strings", ["a", "b"]),
    (["--seed", "9"], "call.seed", 9),
    (["--seed", "9"], "call.routing_seed", 9),
    (["--force-routing", "3"], "call.force_routing", [3]),
    (["--skip-threshold", "0.75"], "call.skip_threshold", 0.75),
    (["--skip", "quality"], "call.skip", "quality"),
    (["--target-layers-skipped", "1.25"], "call.target_layers_skipped", 1.25),
]
ANSWER = [
    (["--do-sample"], "call.do_sample", True),
    (["--no-do-sample"], "call.do_sample", False),
    (["--eos-token-id", "1", "--eos-token-id", "2"], "call.eos_token_id", [1, 2]),
    (["--num-return-sequences", "2"], "call.num_return_sequences", 2),
    (["--logprobs", "2"], "call.logprobs", 2),
    (["--chat"], "call.prompt", [{"role": "user", "content": "text"}]),
    (["--json"], "call.return_routing", True),
    (["--routing-out", "r.json"], "call.return_routing", True),
]
CONVERSION = [
    (["--layers", "2-3"], "convert.routing", {"routing_layers": [2, 3]}),
    (["--router-reduction-factor", "8"], "convert.routing", {"router_reduction_factor": 8}),
    (["--adapter-reduction-factor", "4"], "convert.routing", {"adapter_reduction_factor": 4}),
    (["--router-order", "tanh_norm"], "convert.routing", {"router_order": "tanh_norm"}),
    (["--router-bias"], "convert.routing", {"router_bias": True}),
    (["--no-router-bias"], "convert.routing", {"router_bias": False}),
    (["--gate", "straight_through"], "convert.routing", {"gate": "straight_through"}),
    (["--threshold", "0.25"], "convert.routing", {"router_thresholds": 0.25}),
    (["--seed", "4"], "convert.seed", 4),
    (["--dtype", "float16"], "convert.dtype", "float16"),
    (["--layout", "ddllama"], "convert.layout", "ddllama"),
    (["--overwrite"], "convert.overwrite", True),
    (["--prefer-hub"], "convert.prefer_hub", True),
    (["--base-model", "b"], "convert.base_model", "b"),
]
MERGING = [
    (["--dtype", "float16"], "merge.dtype", "float16"),
    (["--overwrite"], "merge.overwrite", True),
    (["--prefer-hub"], "merge.prefer_hub", True),
    (["--base-model", "b"], "merge.base_model", "b"),
]
TRAINING = [
    (["--output-dir", "p"], "train.output_dir", Path("p")),
    (["--resume"], "train.resume", True),
    (["--train", "a", "--train", "b"], "recipe.train", ["a", "b"]),
    (["--held-out", "h"], "recipe.held_out", ["h"]),
    (["--skip-broken"], "recipe.skip_broken", True),
    (["--base-model", "b"], "recipe.base_model", "b"),
    (["--start", "s"], "recipe.start", "s"),
    (["--target-layers-skipped", "3.5"], "recipe.target_layers_skipped", 3.5),
    (["--set", "seed=1", "--set", "batch_size=2"], "recipe.settings", ["seed=1", "batch_size=2"]),
]
CALIBRATION = [
    *LOADING,
    (["--dtype", "float32"], "load.dtype", "float32"),
    (["--base-model", "b"], "load.base_model", "b"),
    (["--data", "b.txt"], "documents.sources", [Path("b.txt")]),
    (["--targets", "0.5,1"], "calibrate.targets", [0.5, 1.0]),
    (["--tokens", "7"], "texts.tokens", 7),
    (["--length", "15"], "texts.length", 15),
]
MEASUREMENT = [
    (["--prompt", "64,128"], "bench.options.prompts", [64, 128]),
    (["--gen", "32"], "bench.options.steps", 32),
    (["--depth", "16,32"], "bench.options.depths", [16, 32]),
    (["--device", "cpu,cuda"], "bench.options.devices", ["cpu", "cuda"]),
    (["--batch", "1,4"], "bench.options.batches", [1, 4]),
    (["--routing", "fixed"], "bench.options.routing", "fixed"),
    (["--breakdown"], "bench.options.breakdown", True),
    (["--no-memory"], "bench.options.memory", False),
    (["--peer", "llama.cpp"], "bench.options.peers", ["llama.cpp"]),
    (["--skip", "0,2"], "bench.options.skips", [0, 2]),
    (["--skip", "all"], "bench.options.skips", "all"),
    (["--shares", "0,25"], "bench.options.shares", [0.0, 0.25]),
    (["--threads", "1,2"], "bench.options.threads", [1, 2]),
    (["--peers"], "bench.options.peers", ["all"]),
    (["--accuracy"], "bench.options.accuracy", True),
    (["--rounds", "3"], "bench.options.rounds", 3),
    (["--dtype", "float32,bf16"], "bench.options.dtypes", ["float32", "bf16"]),
    (["--prefer-hub"], "bench.options.prefer_hub", True),
]
DISTILLATION = [
    *LOADING,
    (["--dtype", "float32"], "load.dtype", "float32"),
    (["--prompts", "q.jsonl"], "prompts.path", Path("q.jsonl")),
    (["--limit", "3"], "prompts.limit", 3),
    (["--out", "x.jsonl"], "distill.out", Path("x.jsonl")),
    (["--max-new-tokens", "5"], "distill.options.max_new_tokens", 5),
    (["--temperature", "0.3"], "distill.options.temperature", 0.3),
    (["--top-p", "0.25"], "distill.options.top_p", 0.25),
    (["--samples-per-prompt", "2"], "distill.options.samples_per_prompt", 2),
    (["--seed", "9"], "distill.options.seed", 9),
    (["--keep-unfinished"], "distill.options.keep_unfinished", True),
    (["--batch-size", "3"], "distill.batch_size", 3),
    (["--overwrite"], "distill.overwrite", True),
]
TASKS = [
    (["--kinds", "list"], "tasks.kind", "list"),
    (["--count", "5"], "tasks.n", 5),
    (["--seed", "9"], "tasks.seed", 9),
    (["--split", "eval"], "tasks.split", "eval"),
]
EVALUATION = [
    (["--prose", "x"], "eval.options.texts", {"prose": Path("x")}),
    (["--code", "x"], "eval.options.texts", {"prose": Path("p"), "code": Path("x")}),
    (["--chat", "x"], "eval.options.texts", {"prose": Path("p"), "chat": Path("x")}),
    (["--distilled", "x"], "eval.options.texts", {"prose": Path("p"), "distilled": Path("x")}),
    (["--tasks", "x"], "eval.options.tasks", Path("x")),
    (["--skipped", "0,2.5"], "eval.options.skipped", [0.0, 2.5]),
    (["--methods", "random,shortgpt"], "eval.options.methods", ["random", "shortgpt"]),
    (["--also", "a=x", "--also", "b=y=z"], "eval.options.also", {"a": "x", "b": "y=z"}),
    (["--calibration", "x"], "eval.options.calibration", Path("x")),
    (["--tokens", "64"], "eval.options.tokens", 64),
    (["--window", "64"], "eval.options.window", 64),
    (["--calibration-tokens", "64"], "eval.options.calibration_tokens", 64),
    (["--limit", "3"], "eval.options.limit", 3),
    (["--answers", "3"], "eval.options.answers", 3),
    (["--max-new-tokens", "3"], "eval.options.max_new_tokens", 3),
    (["--per-kind", "3"], "eval.options.per_kind", 3),
    (["--kinds-skipped", "3"], "eval.options.kinds_skipped", 3.0),
    (["--seed", "3"], "eval.options.seed", 3),
    (["--dtype", "float32"], "eval.options.dtype", "float32"),
    (["--threads", "3"], "eval.options.num_threads", 3),
    (["--prefer-hub"], "eval.options.prefer_hub", True),
    (["--output-dir", "x"], "eval.output_dir", Path("x")),
]
HANDED_ON = [
    *((GENERATE, *row) for row in MODEL + SAMPLING + ANSWER),
    *((CHAT, *row) for row in MODEL + SAMPLING),
    (CHAT, ["--system", "be brief"], "call.system", "be brief"),
    *((DEMO, *row) for row in LOADING),
    (DEMO, ["--max-new-tokens", "5"], "call.max_new_tokens", 5),
    (DEMO, ["--question", "why"], "call.prompt", [{"role": "user", "content": "why"}]),
    *((CONVERT, *row) for row in CONVERSION),
    *((BENCH, *row) for row in MEASUREMENT),
    *((EVAL, *row) for row in EVALUATION),
    (INSPECT, ["--prefer-hub"], "open.prefer_hub", True),
    *((DISTILL, *row) for row in DISTILLATION),
    *((MAKE_PROMPTS, *row) for row in TASKS),
    (INSPECT, ["--base-model", "b"], "open.base_model", "b"),
    *((MERGE, *row) for row in MERGING),
    *((CALIBRATE, *row) for row in CALIBRATION),
    *((TRAIN, *row) for row in TRAINING),
]
# What changes the printing or what is written and not the work, or is read on the way; other tests look at the output.
PRINTING = {
    "generate": {"--stream", "--color"},
    "chat": {"--color"},
    "demo": {"--color"},
    "bench": {"--output", "--json", "--output-dir"},
    "eval": {"--json"},
    "inspect": {"--json"},
    "doctor": {"--json"},
    "plot": {"--out", "--max-tokens"},
    "calibrate": {"--default"},
    "make-prompts": {"--texts", "--overwrite"},
}


def handed(calls: Calls, path: str) -> Any:
    receiver, *names = path.split(".")
    value: Any = calls[receiver].get(names[0])
    for name in names[1:]:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("call", "options", "path", "value"),
    HANDED_ON,
    ids=[f"{call[0]} {' '.join(options)} {path}" for call, options, path, _ in HANDED_ON],
)
def test_option_is_handed_on(
    run: Command, calls: Calls, call: tuple[str, ...], options: list[str], path: str, value: object
) -> None:
    assert "unexpected Stop" in run(*call).stderr
    assert handed(calls, path) != value, "another value than the default is wanted"
    calls.clear()
    result = run(*call, *options)
    assert "unexpected Stop" in result.stderr, result.output
    assert handed(calls, path) == value


@pytest.mark.parametrize(
    "call",
    [GENERATE, CHAT, DEMO, CONVERT, BENCH, EVAL, INSPECT, DISTILL, MERGE, CALIBRATE],
    ids=lambda c: c[0],
)
def test_the_model_and_the_listener_are_handed_on(
    run: Command, calls: Calls, call: tuple[str, ...]
) -> None:
    run(*call)
    receivers = ("load", "open", "convert", "merge", "bench", "eval")
    loading = next(calls[r] for r in receivers if r in calls)
    names = [loading.get(n) for n in ("model", "name", "base", "routing_directory")]
    options = loading.get("options")
    assert "m" in names or "m" in (getattr(options, "model", None), *getattr(options, "models", ()))
    assert callable(loading["notify"])


def test_no_option_is_left_out() -> None:
    """A new option needs a row in HANDED_ON, or a test of what it prints."""
    commands = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    # `bench MODEL` is `bench run MODEL`; what its siblings take is looked at in tests/bench.
    commands["bench"] = commands["bench"].commands["run"]
    for name, command in commands.items():
        tested = {o for call, options, _, _ in HANDED_ON if call[0] == name for o in options}
        for parameter in command.params:
            names = {*parameter.opts, *parameter.secondary_opts}
            if parameter.param_type_name == "argument" or names & {"--help"}:
                continue
            assert names & (tested | PRINTING.get(name, set())), f"{name} {names}"


def test_plot_draws_as_many_tokens_as_asked(run: Command, calls: Calls, tmp_path: Path) -> None:
    source = tmp_path / "r.json"
    row = torch.ones(1, 2)
    source.write_text(RoutingReport(["a"], row.byte(), row, [2, 3], 4, 1, "router").to_json())
    assert "unexpected Stop" in run("plot", source, "-o", "x.png", "--max-tokens", 7).stderr
    assert calls["plot"]["max_tokens"] == 7


@pytest.mark.parametrize(
    ("how", "order"), [("--stream", ["made", "shown"] * 2), ("--no-stream", ["made", "made"])]
)
def test_stream_shows_tokens_as_they_come(
    run: Command, calls: Calls, monkeypatch: pytest.MonkeyPatch, how: str, order: list[str]
) -> None:
    seen: list[str] = []

    def stream(*_: Any, **__: Any) -> Iterator[Any]:
        for _ in range(2):
            seen.append("made")
            yield SimpleNamespace(text="a", layers_used=3, output=None)
        raise Stop

    monkeypatch.setattr(StubModel, "stream", stream)
    monkeypatch.setattr(TokenPrinter, "token", lambda *_: seen.append("shown"))
    run(*GENERATE, how)
    assert seen == order  # the last token is never made: without --stream nothing is shown
