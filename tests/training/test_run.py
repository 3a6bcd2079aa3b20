"""Whole runs on a tiny base model: what is saved, resuming, steering, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from flexidepth.checkpoints import open_checkpoint, save_routing
from flexidepth.cli.app import app
from flexidepth.config import ABLATIONS
from flexidepth.errors import (
    CheckpointError,
    OutOfMemoryError,
    SaveError,
    UnsupportedError,
    ValueOutOfRangeError,
)
from flexidepth.training import command
from flexidepth.training import run as run_module
from flexidepth.training.claim import claim
from flexidepth.training.command import find_recipe
from flexidepth.training.lock import run_lock
from flexidepth.training.packing import collate
from flexidepth.training.recipe import Recipe
from flexidepth.training.run import TrainingData, run_recipe
from flexidepth.training.start import half_precision, starting_model
from flexidepth.training.trainer import RoutingTrainer, last_checkpoint

LENGTH = 32


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Counting texts: each token follows from the one before."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, 64, (count, 2), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        half = torch.arange(LENGTH // 2)
        ids = torch.cat([(start + half) % 64 for start in self.starts[index]])
        labels = ids.clone()
        labels[[0, LENGTH // 2]] = -100
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": half.repeat(2),
            "document_ids": torch.arange(2).repeat_interleave(LENGTH // 2),
        }


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("base") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def data() -> TrainingData:
    def batch(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate(items, document_ids=True)

    return TrainingData(Sequences(64, 1), Sequences(4, 2), batch)


def recipe(base: Path, *stages: dict[str, Any], **changes: Any) -> Recipe:
    values = {
        "base_model": str(base),
        "routing": {
            "gate": "straight_through",
            "router_reduction_factor": 4,
            "adapter_reduction_factor": 4,
        },
        "gate_bias": 1.0,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 4,
        "precision": "float32",  # what "auto" means depends on the processor
        "data": {"length": LENGTH},
        "stages": list(stages),
    }
    return Recipe.from_dict({**values, **changes})


ADAPTERS = {"name": "adapters", "tokens": 6 * 128, "learning_rate": 3e-3, "lm": 0.0, "adapter": 1.0}
BUDGETS = {
    "name": "budgets",
    "tokens": 6 * 128,
    "learning_rate": 3e-3,
    "router_learning_rate": 1e-3,
    "order_layers": True,
    "lm": 0.0,
    "kl": 1.0,
    "budgets": [0.5, 1],
    "exploration": 0.1,
}


def losses(folder: Path) -> list[float]:
    rows = json.loads((folder / "log.json").read_text())["history"]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_stages_leave_a_routing_checkpoint(base, data, tmp_path):
    result = run_recipe(recipe(base, ADAPTERS, BUDGETS), tmp_path / "run", data)
    assert result == tmp_path / "run" / "budgets" / "routing"
    names = {path.name for path in result.iterdir()}
    assert "routing.safetensors" in names and "model.safetensors" not in names
    checkpoint = open_checkpoint(result)
    assert checkpoint.routers_trained and checkpoint.config.gate == "straight_through"
    stored = dict(checkpoint.tensors())
    start = starting_model(recipe(base, ADAPTERS)).state_dict()
    changed = {n for n, t in stored.items() if not torch.equal(t.float(), start[n].float())}
    assert changed and all(".router." in n or ".adapter." in n for n in changed)
    assert any(".router.enc" in n for n in changed) and any(".adapter." in n for n in changed)
    first = losses(tmp_path / "run" / "adapters")
    assert first[-1] < first[0]
    rows = json.loads((tmp_path / "run" / "budgets" / "log.json").read_text())["history"]
    logged = next(row for row in rows if "loss" in row)
    assert logged["tokens_per_second"] > 0
    assert {"kl", "layers_used", "skip_loss", "skip_rate/2", "offset/0.5", "price/1"} <= set(logged)
    held_out = next(row for row in rows if "eval_1_kl" in row)
    assert held_out["eval_0.5_layers_skipped"] <= held_out["eval_1_layers_skipped"] <= 2
    assert (tmp_path / "run" / "budgets" / "curves.svg").exists()
    for stage in ("adapters", "budgets"):
        figure = tmp_path / f"{stage}.svg"
        drawn = CliRunner().invoke(
            app, ["plot", str(tmp_path / "run" / stage / "log.json"), "-o", str(figure)]
        )
        assert drawn.exit_code == 0 and figure.stat().st_size > 1000


class Killed(Exception):
    """Stands for a signal between two steps."""


def test_a_stage_can_start_from_fitted_adapters(base, data, tmp_path):
    run_recipe(recipe(base, ADAPTERS), tmp_path / "seeded", data)
    fitted = {**ADAPTERS, "fit_adapters": 20 * LENGTH}
    run_recipe(recipe(base, fitted), tmp_path / "fitted", data)
    first, seeded = (losses(tmp_path / name / "adapters")[0] for name in ("fitted", "seeded"))
    assert first < 0.9 * seeded
    with pytest.raises(ValueOutOfRangeError, match="no_adapter"):
        routing = {
            "ablations": ["no_adapter"],
            "gate": "straight_through",
            "router_reduction_factor": 4,
        }
        run_recipe(
            recipe(base, {**BUDGETS, "fit_adapters": 1}, routing=routing), tmp_path / "no", data
        )


def test_two_processes_train_as_one_does_with_twice_the_batches(base, tmp_path):
    from .distributed_run import RECORD, main

    main(str(base), str(tmp_path / "one"), accumulation=2)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = ["tests.training.distributed_run", str(base), str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # The text is made once and then found by the others; the main process alone speaks.
    record = (tmp_path / f"two{RECORD}").read_text().splitlines()
    assert record[:3] == ["0 reads", "said by 0: read", "0 has read"]
    assert record[3:] == ["1 reads", "1 has read"]
    for stage in ("adapters", "budgets"):
        one, two = (losses(tmp_path / name / stage) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-3) and len(one) == 6
        held_out = [
            [row for row in history if any(key.startswith("eval") for key in row)]
            for history in (
                json.loads((tmp_path / name / stage / "log.json").read_text())["history"]
                for name in ("one", "two")
            )
        ]
        for own, other in zip(*held_out, strict=True):
            assert other == pytest.approx(own, rel=1e-2, abs=1e-3)
    stored = [
        dict(open_checkpoint(tmp_path / name / "budgets" / "routing").tensors())
        for name in ("one", "two")
    ]
    for name, tensor in stored[0].items():
        torch.testing.assert_close(stored[1][name], tensor, rtol=1e-2, atol=1e-3)


def killed_run(plan: Recipe, folder: Path, data: TrainingData, monkeypatch, step: int) -> None:
    steer = RoutingTrainer.steer
    last = plan.stages[-1].name

    def dying(self: RoutingTrainer) -> None:
        if self.state.global_step == step and Path(self.args.output_dir).name == last:
            raise Killed
        steer(self)

    with monkeypatch.context() as patch:
        patch.setattr(RoutingTrainer, "steer", dying)
        with pytest.raises(Killed):
            run_recipe(plan, folder, data)


@pytest.mark.parametrize(
    "stage",
    [
        BUDGETS,
        {**BUDGETS, "budgets": None, "exploration": 0.0, "target_layers_skipped": 1.0, "lm": 1.0},
    ],
)
def test_a_killed_run_goes_on_with_the_same_curve(base, data, tmp_path, monkeypatch, stage):
    plan = recipe(base, ADAPTERS, stage)
    whole = run_recipe(plan, tmp_path / "whole", data)
    killed_run(plan, tmp_path / "killed", data, monkeypatch, step=5)
    with pytest.raises(SaveError, match="--resume"):
        run_recipe(plan, tmp_path / "killed", data)
    # A checkpoint that was being written when the run died is passed over.
    torn = tmp_path / "killed" / "budgets" / "checkpoint-6"
    torn.mkdir(exist_ok=True)
    (torn / "trainer_state.json").write_text('{"epoch": ')
    resumed = run_recipe(plan, tmp_path / "killed", data, resume=True)
    for folder in ("adapters", "budgets"):
        first, second = losses(tmp_path / "whole" / folder), losses(tmp_path / "killed" / folder)
        assert len(first) == 6 and first == pytest.approx(second, rel=1e-4)
    a, b = dict(open_checkpoint(whole).tensors()), dict(open_checkpoint(resumed).tensors())
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_killed_in_the_first_stage(base, data, tmp_path, monkeypatch):
    plan = recipe(base, ADAPTERS)
    whole = run_recipe(plan, tmp_path / "whole", data)
    killed_run(plan, tmp_path / "killed", data, monkeypatch, step=3)
    assert last_checkpoint(tmp_path / "killed" / "adapters").name == "checkpoint-2"
    run_recipe(plan, tmp_path / "killed", data, resume=True)
    assert losses(whole.parent) == pytest.approx(losses(tmp_path / "killed" / "adapters"), rel=1e-4)


def test_the_newest_whole_checkpoint_counts(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for number, content in ((2, "{}"), (10, "{}"), (12, '{"epo'), (14, None)):
        path = tmp_path / f"checkpoint-{number}"
        path.mkdir()
        if content is not None:
            (path / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_going_on_from_a_checkpoint(base, data, tmp_path):
    first = run_recipe(recipe(base, ADAPTERS), tmp_path / "a", data)
    model = starting_model(recipe(base, BUDGETS, start=str(first)))
    stored = dict(open_checkpoint(first).tensors())
    for name, parameter in model.named_parameters():
        if ".router." in name or ".adapter." in name:
            torch.testing.assert_close(parameter.detach(), stored[name].float())
            assert parameter.requires_grad


def test_offsets_start_where_the_logits_of_trained_routers_are(base, data, tmp_path):
    trained = starting_model(recipe(base, ADAPTERS))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith("router.head.bias"):
                parameter -= 40.0
    save_routing(trained, tmp_path / "start", base_model=str(base))
    run_recipe(
        recipe(base, {**BUDGETS, "order_layers": False}, start=str(tmp_path / "start")),
        tmp_path / "run",
        data,
    )
    log = json.loads((tmp_path / "run" / "budgets" / "log.json").read_text())
    offsets = [log["history"][0][f"offset/{budget}"] for budget in ("0.5", "1")]
    assert all(-42.0 < offset < -36.0 for offset in offsets) and offsets[0] <= offsets[1]


def test_a_stage_with_a_seed_sees_the_text_in_another_order(base, data, tmp_path):
    seen: list[int] = []

    class Watched(Sequences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            seen.append(int(index))
            return super().__getitem__(index)

    watched = dataclasses.replace(data, train=Watched(64, 1), held_out=None)
    stages = [{**ADAPTERS, "name": name} for name in ("one", "two", "three")]
    stages[2]["seed"] = 1
    run_recipe(recipe(base, *stages), tmp_path / "run", watched)
    seen = seen[4:]  # the text is marked by those
    of_one = len(seen) // 3
    one, two, three = seen[:of_one], seen[of_one : 2 * of_one], seen[2 * of_one :]
    assert one == two and one != three and len(set(three)) >= 24


def test_a_stage_with_data_sees_its_own_text(base, data, tmp_path):
    class Named(Sequences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            seen.append(self)
            return super().__getitem__(index)

    seen: list[Named] = []
    shared, own, held_out = Named(64, 1), Named(64, 3), Named(4, 4)
    text = {"train": ["own.jsonl"], "length": LENGTH // 2}
    plan = recipe(base, ADAPTERS, {**ADAPTERS, "name": "own", "data": text})
    both = dataclasses.replace(
        data,
        train=shared,
        stages={"own": dataclasses.replace(data, train=own, held_out=held_out)},
    )
    run_recipe(plan, tmp_path / "run", both)
    after_marks = seen[12:]  # of four sequences each
    first = after_marks.index(own)
    assert set(after_marks[:first]) == {shared} and set(after_marks[first:]) == {own, held_out}
    logs = [losses(tmp_path / "run" / name) for name in ("adapters", "own")]
    assert [len(log) for log in logs] == [6, 12]  # tokens are counted in its own sequences
    for name, count in (("own", 63), ("moved", 64)):
        other = dataclasses.replace(both.stages["own"], train=Sequences(count, 3))
        changed = dataclasses.replace(both, stages={"own": other})
        if name == "moved":
            text["train"] = ["elsewhere.jsonl"]
            moved = recipe(base, ADAPTERS, {**ADAPTERS, "name": "own", "data": text})
            run_recipe(moved, tmp_path / "run", changed, resume=True)
        else:
            with pytest.raises(ValueOutOfRangeError, match="text of own was '64 sequences, "):
                run_recipe(plan, tmp_path / "run", changed, resume=True)


@pytest.mark.parametrize("every", [False, True])
def test_text_is_read_for_each_stage(base, monkeypatch, every):
    made: list[tuple[list[str], str, int]] = []

    def packed(sources: list[str], _: Any, *, split: str, length: int, **__: Any) -> list[int]:
        made.append((sources, split, length))
        return [0] * 40

    class Opened:
        def tokenizer(self) -> object:
            return object()

    monkeypatch.setattr("flexidepth.training.dataset.load_packed", packed)
    monkeypatch.setattr(command, "open_checkpoint", lambda _: Opened())
    own = {"train": ["own"], "held_out": ["h"], "length": 8}
    first = {**ADAPTERS, "data": {"train": ["first"]}} if every else ADAPTERS
    plan = recipe(
        base, first, {**BUDGETS, "data": own}, data={} if every else {"train": ["a"], "length": 16}
    )
    loaded = command.load_data(plan, lambda _: None)
    assert (["own"], "all", 8) in made and (["h"], "all", 8) in made and len(made) == 4
    if every:
        assert (["first"], "held_out", 2048) in made and set(loaded.stages) == {
            "adapters",
            "budgets",
        }
    else:
        assert (["a"], "train", 16) in made and set(loaded.stages) == {"budgets"}
        assert loaded.of(plan.stages[0]) is loaded
    assert loaded.of(plan.stages[1]) is loaded.stages["budgets"]
    with pytest.raises(ValueOutOfRangeError, match="no text to train on"):
        command.load_data(recipe(base, ADAPTERS, {**BUDGETS, "data": own}), lambda _: None)


def test_another_recipe_is_refused(base, data, tmp_path):
    run_recipe(recipe(base, ADAPTERS), tmp_path / "run", data)
    with pytest.raises(ValueOutOfRangeError, match="another recipe"):
        run_recipe(recipe(base, ADAPTERS, seed=1), tmp_path / "run", data, resume=True)
    for text in (Sequences(64, 5), Sequences(63, 1)):
        with pytest.raises(ValueOutOfRangeError, match="text was '64 sequences, "):
            other = dataclasses.replace(data, train=text)
            run_recipe(recipe(base, ADAPTERS), tmp_path / "run", other, resume=True)


def test_a_run_of_an_older_version_goes_on(base, data, tmp_path):
    """Which knew fewer keys; they take their defaults, and others count still."""
    plan = recipe(base, ADAPTERS)
    first = run_recipe(plan, tmp_path / "run", data)
    path = tmp_path / "run" / "recipe.json"
    content = json.loads(path.read_text())
    del content["recipe"]["estimator"], content["recipe"]["stages"][0]["seed"]
    path.write_text(json.dumps(content))
    assert run_recipe(plan, tmp_path / "run", data, resume=True) == first
    for other in (
        recipe(base, ADAPTERS, estimator="sparsemixer"),
        recipe(base, {**ADAPTERS, "seed": 1}),
    ):
        with pytest.raises(ValueOutOfRangeError, match="another recipe"):
            run_recipe(other, tmp_path / "run", data, resume=True)


def test_a_folder_in_which_another_process_trains_is_refused(base, data, tmp_path):
    plan = recipe(base, ADAPTERS)
    with run_lock(tmp_path / "run"), pytest.raises(SaveError, match="another process is training"):
        run_recipe(plan, tmp_path / "run", data, resume=True)
    assert not (tmp_path / "run" / "recipe.json").exists()
    with (
        pytest.raises(ValueOutOfRangeError, match="budgets"),
        pytest.MonkeyPatch.context() as patch,
    ):
        # Held while it trains, too, and let go of after an error.
        patch.setattr(run_module, "starting_model", lambda plan: held(plan, tmp_path / "run"))
        run_recipe(recipe(base, {**BUDGETS, "budgets": [5]}), tmp_path / "run", data)
    with run_lock(tmp_path / "run"):
        pass


def held(plan: Recipe, folder: Path) -> Any:
    with pytest.raises(SaveError, match="another process is training"):
        run_lock(folder).__enter__()
    return starting_model(plan)


def test_a_missed_target_is_told_at_the_end_of_its_stage(base, data, tmp_path):
    said: list[str] = []
    run_recipe(recipe(base, STEERED), tmp_path / "told", data, notify=said.append)
    assert len(said) == 1 and "held-out text skips" in said[0] and "budgets: [1]" in said[0]
    with pytest.warns(UserWarning, match="target_layers_skipped is 1"):
        run_recipe(recipe(base, STEERED), tmp_path / "warned", data)


def test_a_steered_penalty_starts_balanced(base, data, tmp_path):
    for name, own in (("balanced", 0.0), ("larger", 30.0)):
        run_recipe(
            recipe(base, {**STEERED, "skip_penalty": own}, save_steps=1), tmp_path / name, data
        )
    starts = [
        json.loads((tmp_path / name / "s" / "checkpoint-1" / "steering.json").read_text())["start"]
        for name in ("balanced", "larger")
    ]
    assert starts[0] > 1e-3 and starts[1] == 30.0


def test_the_papers_start_is_near_the_base_model(base):
    ids = Sequences(8, 3)
    inputs = torch.stack([ids[i]["input_ids"][: LENGTH // 2] for i in range(8)])
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(base)(inputs).logits.log_softmax(-1)
        routing = {
            "gate": "multiplier",
            "router_reduction_factor": 4,
            "adapter_reduction_factor": 4,
        }
        plan = recipe(base, ADAPTERS, routing=routing, gate_bias=find_recipe("paper").gate_bias)
        found = starting_model(plan).eval()(inputs).logits.log_softmax(-1)
    apart = (wanted.exp() * (wanted - found)).sum(-1).mean()
    assert apart < 1e-3  # 5e-3 with a bias of 2


def test_what_only_changes_speed_may_differ(base, data, tmp_path):
    first = run_recipe(recipe(base, ADAPTERS), tmp_path / "run", data)
    other = recipe(base, ADAPTERS, batch_size=4, gradient_accumulation=1, save_steps=3)
    assert run_recipe(other, tmp_path / "run", data, resume=True) == first
    with pytest.raises(ValueOutOfRangeError, match="sequences a step was 4, is 8"):
        run_recipe(
            recipe(base, ADAPTERS, gradient_accumulation=4), tmp_path / "run", data, resume=True
        )


def test_killed_after_the_last_step(base, data, tmp_path, monkeypatch):
    def dying(*_: Any) -> None:
        raise Killed

    plan = recipe(base, ADAPTERS)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_training_figure", dying)
        with pytest.raises(Killed):
            run_recipe(plan, tmp_path / "run", data)
    before = losses(tmp_path / "run" / "adapters")
    result = run_recipe(plan, tmp_path / "run", data, resume=True)
    assert losses(tmp_path / "run" / "adapters") == before and result.is_dir()


def test_wrong_later_stages_are_found_before_the_first_runs(base, data, tmp_path):
    late = {"name": "late", "tokens": 128, "budgets": [5]}
    with pytest.raises(ValueOutOfRangeError, match="budgets"):
        run_recipe(recipe(base, ADAPTERS, late), tmp_path / "a", data)
    assert not (tmp_path / "a" / "adapters").exists()
    with pytest.raises(UnsupportedError, match="router_bias: true"):
        routing = {"router_bias": False, "gate": "straight_through", "adapter_reduction_factor": 4}
        run_recipe(recipe(base, ADAPTERS, BUDGETS, routing=routing), tmp_path / "b", data)


def test_a_start_on_another_base_is_refused(base, data, tmp_path):
    first = run_recipe(recipe(base, ADAPTERS), tmp_path / "a", data)
    other = LlamaForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another base model"):
        run_recipe(recipe(tmp_path / "other", BUDGETS, start=str(first)), tmp_path / "b", data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides there")
@pytest.mark.parametrize(
    ("flags", "half"), [({"avx512f", "amx_bf16"}, True), ({"avx512_bf16"}, False)]
)
def test_bfloat16_is_chosen_where_the_processor_is_fast_in_it(base, monkeypatch, flags, half):
    monkeypatch.setattr("flexidepth.training.start.cpu_flags", lambda: flags)
    assert half_precision(recipe(base, ADAPTERS, precision="auto")) is half
    assert half_precision(recipe(base, ADAPTERS, precision="bf16"))
    assert not half_precision(recipe(base, ADAPTERS, precision="float32"))


def test_a_half_precision_base_trains_beside_float32_routers(base, data, tmp_path):
    plan = recipe(base, ADAPTERS, BUDGETS, precision="bf16")
    model = starting_model(plan)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    result = run_recipe(plan, tmp_path / "run", data)
    open_checkpoint(result)  # its base is the stored one


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_settings(base, data, tmp_path, monkeypatch, error):
    def burst(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(RoutingTrainer, "compute_loss", burst)
    with pytest.raises(OutOfMemoryError, match=r"lower batch_size \(2\).*gradient_checkpointing"):
        run_recipe(recipe(base, ADAPTERS), tmp_path / "run", data)


def test_out_of_memory_while_loading(base, data, tmp_path, monkeypatch):
    def burst(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(run_module, "starting_model", burst)
    with pytest.raises(OutOfMemoryError, match=r"2\.00 GiB.*precision: bf16"):
        run_recipe(recipe(base, ADAPTERS), tmp_path / "run", data)


def test_looking_at_held_out_text_changes_nothing(base, data, tmp_path):
    """Training draws from the same generator as before, however often it is looked at."""
    for steps in (1, 1000):
        run_recipe(recipe(base, BUDGETS, eval_steps=steps), tmp_path / str(steps), data)
    often, never = (losses(tmp_path / str(steps) / "budgets") for steps in (1, 1000))
    assert often == never


STEERED = {"name": "s", "tokens": 2 * 128, "lm": 1.0, "target_layers_skipped": 1.0}


@pytest.mark.parametrize(
    ("change", "held_out", "message"),
    [
        ({"eval_steps": 2}, Sequences(4, 2), "eval_steps was 4, is 2"),
        ({"eval_sequences": 3}, Sequences(4, 2), "eval_sequences was 16, is 3"),
        ({}, Sequences(4, 3), "held_out was '4 sequences, "),
    ],
)
def test_what_steers_a_target_may_not_differ(base, data, tmp_path, change, held_out, message):
    run_recipe(recipe(base, STEERED), tmp_path / "run", data)
    other = dataclasses.replace(data, held_out=held_out)
    with pytest.raises(ValueOutOfRangeError, match=message):
        run_recipe(recipe(base, STEERED, **change), tmp_path / "run", other, resume=True)
    # Without a target it is looked at and no more.
    first = run_recipe(recipe(base, ADAPTERS), tmp_path / "free", data)
    again = run_recipe(recipe(base, ADAPTERS, **change), tmp_path / "free", other, resume=True)
    assert again == first


def test_a_recipe_is_on_disk_whole_or_not_at_all(base, data, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            claim(tmp_path, recipe(base, ADAPTERS), resume=False, sequences=4, marks={"text": "x"})
    assert not (tmp_path / "recipe.json").exists()
    claim(tmp_path, recipe(base, ADAPTERS), resume=False, sequences=4, marks={"text": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_steering_goes_by_held_out_text(base, data, tmp_path):
    stage = {"name": "s", "tokens": 128, "lm": 1.0, "target_layers_skipped": 1.0}
    run_recipe(recipe(base, stage, save_steps=1), tmp_path / "run", data)
    folder = tmp_path / "run" / "s"
    state = json.loads((folder / "checkpoint-1" / "steering.json").read_text())
    rows = json.loads((folder / "log.json").read_text())["history"]
    found = next(row["eval_layers_skipped"] for row in rows if "eval_layers_skipped" in row)
    assert state["apart"] == pytest.approx(0.3 * (state["mean"] - found), abs=1e-3)
    assert state["apart"] != 0


def test_a_target_is_met_on_held_out_text(base, data, tmp_path):
    """Which skips less here than the training text, of sixteen tokens alone; the recipe would look at it too rarely."""

    class Few(Sequences):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            item = super().__getitem__(index)
            return {**item, "input_ids": item["input_ids"] % 16}

    stage = {
        "name": "s",
        "tokens": 200 * 128,
        "learning_rate": 5e-3,
        "final_learning_rate": 1.0,
        "lm": 0.0,
        "kl": 1.0,
        "skip_penalty": 0.05,
        "target_layers_skipped": 1.0,
    }
    plan = recipe(base, stage, eval_steps=1000, save_steps=1000)
    run_recipe(plan, tmp_path, TrainingData(Few(64, 1), Sequences(8, 2), data.collate))
    rows = json.loads((tmp_path / "s" / "log.json").read_text())["history"]
    found = {r["step"]: r["eval_layers_skipped"] for r in rows if "eval_layers_skipped" in r}
    assert list(found) == list(range(25, 201, 25))
    assert found[200] == pytest.approx(1.0, abs=0.15)
    trained = [r["layers_skipped"] for r in rows if "loss" in r][-25:]
    assert sum(trained) / len(trained) > 1.3


def test_steering_a_target_more_often_than_the_recipe_says_is_told(base, monkeypatch):
    monkeypatch.setattr(command, "load_data", lambda *_: None)
    monkeypatch.setattr(command, "run_recipe", lambda *_, **__: Path("result"))
    said: list[str] = []
    for plan in (recipe(base, STEERED, eval_steps=1000), recipe(base, BUDGETS, eval_steps=1000)):
        command.train_recipe(plan, "run", notify=said.append)
    assert len(said) == 1 and "stage s: held-out text every 1 steps, not 1000" in said[0]


@pytest.mark.parametrize("target", [0, 2, 7.5])
def test_a_target_that_cannot_be_met(base, data, tmp_path, target):
    stage = {"name": "s", "tokens": 128, "target_layers_skipped": target}
    with pytest.raises(ValueOutOfRangeError, match="between 0 and 2"):
        run_recipe(recipe(base, stage), tmp_path / "run", data)


def test_sparsemixer_and_checkpointing_are_options(base, data, tmp_path):
    plan = recipe(
        base,
        {"name": "s", "tokens": 4 * 128, "learning_rate": 1e-3, "skip_penalty": 1e-3},
        routing={"gate": "multiplier", "router_reduction_factor": 4, "adapter_reduction_factor": 4},
        estimator="sparsemixer",
        gradient_checkpointing=True,
    )
    assert all(layer.sampled_gates for layer in starting_model(plan).routed_layers())
    run_recipe(plan, tmp_path / "run", data)
    assert len(losses(tmp_path / "run" / "s")) == 4


def test_the_command_says_what_is_missing_and_how_to_go_on(monkeypatch, tmp_path):
    def interrupted(recipe: Recipe, folder: Path, **_: Any) -> None:
        assert recipe.batch_size == 7
        folder.mkdir()
        raise KeyboardInterrupt

    arguments = ["train", "smollm2-135m", "--output-dir", str(tmp_path / "run"), "--set"]
    monkeypatch.setattr(command, "train_recipe", interrupted)
    result = CliRunner().invoke(app, [*arguments, "batch_size=7"])
    assert result.exit_code == 130 and "with --resume" in result.stderr
    result = CliRunner().invoke(app, [*arguments, "batch_size=x"])
    assert result.exit_code == 1 and "batch_size is 'x'" in result.stderr
    for name in ("accelerate", "accelerate.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("command", "run", "trainer"):
        monkeypatch.delitem(sys.modules, f"flexidepth.training.{name}")
    result = CliRunner().invoke(app, [*arguments, "batch_size=7"])
    assert result.exit_code == 1 and "accelerate" in result.stderr
    assert 'pip install "flexidepth[train]"' in result.stderr


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablated_models_train(base, data, tmp_path, name):
    routing = {
        "gate": "straight_through",
        "router_reduction_factor": 4,
        "adapter_reduction_factor": 4,
        "ablations": [name],
    }
    result = run_recipe(recipe(base, BUDGETS, routing=routing), tmp_path / "run", data)
    assert open_checkpoint(result).config.ablations == [name]
    if name == "no_adapter":
        with pytest.raises(ValueOutOfRangeError, match="leave the stage out"):
            run_recipe(recipe(base, ADAPTERS, routing=routing), tmp_path / "other", data)


def test_a_result_that_is_there_is_not_trained_again(base, data, tmp_path, monkeypatch):
    plan = recipe(base, ADAPTERS)
    result = run_recipe(plan, tmp_path / "run", data)
    monkeypatch.setattr(run_module, "_run_stage", lambda *_: pytest.fail("trained again"))
    assert run_recipe(plan, tmp_path / "run", data, resume=True) == result
    shutil.rmtree(result)
    with pytest.raises(pytest.fail.Exception):
        run_recipe(plan, tmp_path / "run", data, resume=True)
