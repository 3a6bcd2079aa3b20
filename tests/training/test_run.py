"""Whole runs on a tiny base model: what is saved, resuming, steering, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
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
from flexidepth.training import command, processes
from flexidepth.training import run as run_module
from flexidepth.training.command import find_recipe
from flexidepth.training.recipe import Recipe
from flexidepth.training.run import TrainingData, run_recipe
from flexidepth.training.start import half_precision, starting_model
from flexidepth.training.trainer import RoutingTrainer, last_checkpoint

from .runs import ADAPTERS, BUDGETS, LENGTH, Sequences, losses, recipe


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


@pytest.mark.parametrize("main", [True, False])
def test_one_process_says_where_the_checkpoint_is(monkeypatch, tmp_path, main):
    monkeypatch.setattr(command, "train_recipe", lambda *_, **__: tmp_path / "routing")
    monkeypatch.setattr(processes, "all_processes", lambda: SimpleNamespace(is_main_process=main))
    result = CliRunner().invoke(app, ["train", "smollm2-135m", "--output-dir", str(tmp_path)])
    assert result.exit_code == 0
    assert result.stdout == (f"{tmp_path / 'routing'}\n" if main else "")
    assert ("flexidepth calibrate" in result.stderr) is main


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
