"""Routing checkpoints: routers and adapters alone, put on their base model again or refused."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexidepth import FlexiDepth, FlexiDepthForCausalLM
from flexidepth.checkpoints import load_trainable, merge, open_checkpoint, save_routing, source
from flexidepth.errors import (
    CheckpointError,
    DtypeError,
    ModelNotFoundError,
    SaveError,
    ValueOutOfRangeError,
)
from tests.checkpoints.test_saving import contents, largest_file, survives
from tests.checkpoints.tiny import base_model, save_base, state, write_gguf

ROUTING: dict[str, Any] = {
    "routing_layers": [1, 3],
    "router_bias": True,
    "router_thresholds": [0.25, 0.75],
}


def trained_model(base: Path, step: int = 1, **routing: Any) -> FlexiDepthForCausalLM:
    """A model whose routers and adapters are no seed's."""
    model = load_trainable(base, routing={**ROUTING, **routing}, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name or ".adapter." in name:
                parameter.add_(0.01 * step * torch.randn_like(parameter))
    return model


def tensors_of(path: Path | str, **arguments: Any) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(path, **arguments).tensors())


@pytest.fixture
def model(llama_dir: Path) -> FlexiDepthForCausalLM:
    return trained_model(llama_dir)


@pytest.fixture
def saved(model: FlexiDepthForCausalLM, llama_dir: Path, tmp_path: Path) -> Path:
    return save_routing(model, tmp_path / "parent" / "routing", base_model=llama_dir)


def test_only_routers_and_adapters_are_stored(saved: Path, model: FlexiDepthForCausalLM) -> None:
    assert sorted(contents(saved)) == ["config.json", "routing.safetensors"]
    stored = load_file(saved / "routing.safetensors")
    own = {k: v for k, v in model.state_dict().items() if ".router." in k or ".adapter." in k}
    assert stored.keys() == own.keys() and len(own) == 2 * 8
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if ".router." in name else torch.bfloat16)
        assert torch.equal(tensor, own[name].to(tensor.dtype))


def test_the_base_comes_from_its_source_and_the_routing_from_the_file(
    saved: Path, model: FlexiDepthForCausalLM, llama_dir: Path
) -> None:
    checkpoint = open_checkpoint(saved)
    assert (checkpoint.source, checkpoint.base) == (str(saved), str(llama_dir))
    assert checkpoint.routers_trained
    before, after = model.config.to_dict(), checkpoint.config.to_dict()
    assert after == {**before, "architectures": ["FlexiDepthForCausalLM"]}
    assert "base_model" not in after  # else it would be saved with a whole model, too
    tensors = dict(checkpoint.tensors())
    for name, tensor in model.state_dict().items():
        rounded = tensor.bfloat16().float() if ".adapter." in name else tensor
        assert torch.equal(tensors[name].float(), rounded), name


def test_the_fingerprint_is_the_sha256_of_the_norms(saved: Path) -> None:
    base = state(base_model())
    digest = hashlib.sha256()
    for layer in range(4):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            digest.update(base[f"model.layers.{layer}.{norm}.weight"].numpy().tobytes())
    digest.update(base["model.norm.weight"].numpy().tobytes())
    content = json.loads((saved / "config.json").read_text())
    assert content["base_fingerprint"] == digest.hexdigest()


def test_the_engine_computes_what_the_trained_model_computes(
    model: FlexiDepthForCausalLM, llama_dir: Path, tmp_path: Path
) -> None:
    saved = save_routing(model, tmp_path / "r", base_model=llama_dir, dtype=torch.float32)
    ids = torch.randint(0, 320, (40,))
    with torch.no_grad():
        out = model(ids[None])
    want = out.logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    with FlexiDepth.from_pretrained(saved, dtype="float32", num_threads=1) as llm:
        assert llm.routers_trained
        score = llm.score(ids.tolist())
    torch.testing.assert_close(score.logprobs, want, rtol=1e-4, atol=1e-4)
    assert score.mean_layers_used == pytest.approx(2 + float(out.run.sum()) / 40)


@pytest.mark.parametrize("tied", [False, True])
def test_it_loads_as_the_model_that_trains(tmp_path: Path, tied: bool) -> None:
    save_base(tmp_path / "base", tie_word_embeddings=tied)
    model = trained_model(tmp_path / "base")
    saved = save_routing(model, tmp_path / "r", base_model=tmp_path / "base", dtype=torch.float32)
    again = load_trainable(saved)
    assert not again.training and again.config.to_dict() == open_checkpoint(saved).config.to_dict()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert load_trainable(saved, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_gguf_base_gives_its_tokenizer_and_a_quantised_copy_is_the_same_base(
    tmp_path: Path,
) -> None:
    import gguf

    file = write_gguf(tmp_path / "base.gguf", base_model())
    saved = save_routing(trained_model(file), tmp_path / "r", base_model=file)
    checkpoint = open_checkpoint(saved)
    assert checkpoint.tokenizer()("hello")["input_ids"]
    narrow = write_gguf(tmp_path / "q8.gguf", base_model(), gguf.GGMLQuantizationType.Q8_0)
    other = open_checkpoint(saved, base_model=narrow)
    assert other.base == str(narrow)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(dict(other.tensors())[name], dict(checkpoint.tensors())[name])


def test_a_routing_of_another_base_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = base_model()
    with torch.no_grad():
        other.model.layers[3].post_attention_layernorm.weight[5] += 0.125
    other.save_pretrained(tmp_path / "other")
    want = json.loads((saved / "config.json").read_text())["base_fingerprint"]
    with pytest.raises(CheckpointError, match="trained on another base model") as caught:
        open_checkpoint(saved, base_model=tmp_path / "other")
    assert want in str(caught.value) and str(tmp_path / "other") in str(caught.value)
    assert len([w for w in str(caught.value).split() if len(w.strip(",;")) == 64]) == 2


def test_a_base_model_that_was_resized_is_refused(saved: Path, tmp_path: Path) -> None:
    base = base_model()
    base.resize_token_embeddings(330)
    base.save_pretrained(tmp_path / "resized")
    with pytest.raises(CheckpointError, match=r"2 tensors .* model\.embed_tokens\.weight: \(330"):
        open_checkpoint(saved, base_model=tmp_path / "resized")


def test_a_base_model_that_is_gone_names_both_ways_out(
    saved: Path, llama_dir: Path, tmp_path: Path
) -> None:
    moved = llama_dir.rename(tmp_path / "moved")
    with pytest.raises(ModelNotFoundError, match="base_model=") as caught:
        open_checkpoint(saved)
    text = str(caught.value)
    assert str(llama_dir) in text and "--base-model" in text and "or put it there" in text
    assert open_checkpoint(saved, base_model=moved).base == str(moved)
    with FlexiDepth.from_pretrained(saved, base_model=moved, num_threads=1) as llm:
        assert llm.generate([1, 2], max_new_tokens=1).token_ids


def test_a_relative_path_is_kept_absolute_and_one_written_by_hand_goes_from_the_checkpoint(
    model: FlexiDepthForCausalLM, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(llama_dir.parent)
    saved = save_routing(model, tmp_path / "r", base_model=llama_dir.name)
    content = json.loads((saved / "config.json").read_text())
    assert content["base_model"] == str(llama_dir)
    content["base_model"] = f"../{llama_dir.name}"
    (saved / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir("/")
    assert open_checkpoint(saved).base == f"{saved}/../{llama_dir.name}"


def test_a_routing_checkpoint_is_no_base_and_a_whole_model_has_none(
    saved: Path, llama_dir: Path
) -> None:
    with pytest.raises(CheckpointError, match="a routing checkpoint itself"):
        open_checkpoint(saved, base_model=saved)
    with pytest.raises(ValueOutOfRangeError, match=r"no routing checkpoint.*leave base_model out"):
        open_checkpoint(llama_dir, base_model=llama_dir)


def test_a_whole_flexidepth_model_can_be_the_base(saved: Path, tmp_path: Path) -> None:
    whole = merge(saved, tmp_path / "whole", dtype="f32")
    assert torch.equal(
        tensors_of(saved, base_model=whole)["model.layers.1.router.enc.weight"],
        tensors_of(saved)["model.layers.1.router.enc.weight"],
    )


def test_routing_arguments_are_those_of_any_stored_routing(saved: Path) -> None:
    config = open_checkpoint(saved, routing={"router_thresholds": 0.5}).config
    assert config.router_thresholds == [0.5, 0.5]
    with pytest.raises(ValueOutOfRangeError, match="routing_layers"):
        open_checkpoint(saved, routing={"routing_layers": [2]})


def test_untrained_routers_stay_untrained(
    model: FlexiDepthForCausalLM, llama_dir: Path, tmp_path: Path
) -> None:
    saved = save_routing(model, tmp_path / "r", base_model=llama_dir, routers_trained=False)
    assert open_checkpoint(saved).routers_trained is False


def test_merging_gives_a_model_that_needs_no_other(
    saved: Path, llama_dir: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone().float() for name, tensor in tensors_of(saved).items()}
    out = merge(saved, tmp_path / "whole", dtype="f32")
    moved = llama_dir.rename(tmp_path / "moved")
    checkpoint = open_checkpoint(out)
    assert checkpoint.routers_trained and checkpoint.base is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in checkpoint.tensors())
    assert FlexiDepthForCausalLM.from_pretrained(out).config.routing_layers == [1, 3]
    again = merge(saved, tmp_path / "second", base_model=moved)
    assert tensors_of(again)["model.embed_tokens.weight"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no routing checkpoint"):
        merge(out, tmp_path / "third")
    with pytest.raises(SaveError, match="not empty"):
        merge(saved, out, base_model=moved)
    with pytest.raises(DtypeError, match="merge: dtype is 'int4'"):
        merge(saved, tmp_path / "third", dtype="int4")


@pytest.mark.parametrize("key", ["base_model", "base_fingerprint"])
def test_a_configuration_that_does_not_name_its_base(saved: Path, key: str) -> None:
    content = json.loads((saved / "config.json").read_text())
    del content[key]
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"config\.json: lacks {key}"):
        open_checkpoint(saved)


def test_tensors_of_another_shape_or_number_are_refused(saved: Path) -> None:
    path = saved / "routing.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = "model.layers.3.router.norm.weight"
    save_file({**tensors, name: torch.ones(5)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"{name} is \[5\] instead of \[4\]"):
        open_checkpoint(saved)
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=rf"1 tensors missing \({name}\)"):
        open_checkpoint(saved)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        open_checkpoint(saved)


def test_saving_again_replaces_it_and_leaves_other_files(saved: Path, llama_dir: Path) -> None:
    (saved / "optimizer.pt").write_bytes(b"state")
    second = trained_model(llama_dir, 2)
    save_routing(second, saved, base_model=llama_dir, dtype=torch.float32)
    assert sorted(contents(saved)) == ["config.json", "optimizer.pt", "routing.safetensors"]
    name = "model.layers.3.adapter.up_proj.weight"
    assert torch.equal(tensors_of(saved)[name], second.state_dict()[name])


def test_another_model_is_not_replaced(
    model: FlexiDepthForCausalLM, llama_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with survives(llama_dir), pytest.raises(SaveError, match="holds another model"):
        save_routing(model, llama_dir, base_model=llama_dir)
    with pytest.raises(SaveError, match="is a file"):
        save_routing(model, tmp_path / "file", base_model=llama_dir)


def test_what_cannot_be_saved(
    model: FlexiDepthForCausalLM, saved: Path, llama_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(DtypeError, match=r"dtype is torch\.int8"):
        save_routing(model, saved, base_model=llama_dir, dtype=torch.int8)
    plain = load_trainable(llama_dir, routing={"routing_layers": []})
    with pytest.raises(ValueOutOfRangeError, match="routes no layer"):
        save_routing(plain, tmp_path / "none", base_model=llama_dir)
    with torch.no_grad():
        model.model.layers[1].adapter.up_proj.weight[2, 3] = torch.nan
    with survives(saved), pytest.raises(CheckpointError, match=r"first at \[2, 3\]"):
        save_routing(model, saved, base_model=llama_dir)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("size", [0, 1000, 12_000])
def test_the_old_one_survives_a_full_disk(saved: Path, llama_dir: Path, size: int) -> None:
    second = trained_model(llama_dir, 2)
    with survives(saved), pytest.raises(SaveError, match="writing"), largest_file(size):
        save_routing(second, saved, base_model=llama_dir)


def killed_at(call: int, save: Any) -> bool:
    """Run `save` in a child process that is killed right before its call-th change of names.

    Returns whether there was such a call.
    """
    child = os.fork()
    if child == 0:
        replace, done = os.replace, 0

        def counted(*arguments: Any) -> None:
            nonlocal done
            if done == call:
                os._exit(9)
            done += 1
            replace(*arguments)

        os.replace = os.rename = counted  # type: ignore[assignment]
        try:
            save()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_one(
    saved: Path, model: FlexiDepthForCausalLM, llama_dir: Path
) -> None:
    name = "model.layers.1.router.enc.weight"
    old, first = model.state_dict()[name], open_checkpoint(saved).config.router_thresholds
    second = trained_model(llama_dir, 2, router_thresholds=[0.5, 0.125])
    new = second.state_dict()[name]
    seen = []
    for call in range(10):
        save_routing(model, saved, base_model=llama_dir)
        if not killed_at(call, lambda: save_routing(second, saved, base_model=llama_dir)):
            break
        checkpoint = open_checkpoint(saved)
        found = dict(checkpoint.tensors())[name]
        is_new = torch.equal(found, new)
        assert is_new or torch.equal(found, old)
        assert checkpoint.config.router_thresholds == ([0.5, 0.125] if is_new else first)
        seen.append(is_new)
    assert seen == [False, True]
    assert torch.equal(tensors_of(saved)[name], new)


def test_a_kill_in_a_first_saving_leaves_nothing_or_the_whole(
    model: FlexiDepthForCausalLM, llama_dir: Path, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    assert killed_at(0, lambda: save_routing(model, target, base_model=llama_dir))
    assert not target.exists()
    target.mkdir()  # as a trainer makes it, for other files
    assert killed_at(1, lambda: save_routing(model, target, base_model=llama_dir))
    assert open_checkpoint(target).config.router_thresholds == [0.25, 0.75]


@pytest.fixture
def shipped(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FlexiDepthForCausalLM:
    """A trained routing that comes with the package, for a stand-in of the default model."""
    base = write_gguf(tmp_path / "stand-in.gguf", base_model())
    monkeypatch.setattr(source, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr(source, "fetch_default_model", lambda *_: base)
    model = trained_model(llama_dir)
    save_routing(model, tmp_path / "pretrained" / "smollm2-135m", base_model="smollm2-135m")
    return model


def test_the_default_model_comes_with_trained_routers(
    shipped: FlexiDepthForCausalLM, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint("smollm2-135m")
    assert checkpoint.routers_trained and checkpoint.base == str(tmp_path / "stand-in.gguf")
    assert checkpoint.config.routing_layers == [1, 3]
    name = "model.layers.1.router.enc.weight"
    assert torch.equal(dict(checkpoint.tensors())[name], shipped.state_dict()[name])
    content = json.loads((tmp_path / "pretrained/smollm2-135m/config.json").read_text())
    assert content["base_model"] == "smollm2-135m"
    with FlexiDepth.from_pretrained(
        "smollm2-135m", routing={"router_thresholds": 0.125}, num_threads=1
    ) as llm:
        assert llm.routers_trained and llm.config.router_thresholds == [0.125, 0.125]


@pytest.mark.parametrize(
    "arguments",
    [{"seed": 0}, {"routing": {"routing_layers": [1, 3]}}, {"routing": {"router_bias": True}}],
)
def test_seeded_routers_of_the_default_model_can_be_asked_for(
    shipped: FlexiDepthForCausalLM, arguments: dict[str, Any]
) -> None:
    checkpoint = open_checkpoint("smollm2-135m", **arguments)
    assert checkpoint.routers_trained is False and checkpoint.base is None
    with FlexiDepth.from_pretrained("smollm2-135m", num_threads=1, **arguments) as llm:
        assert llm.routers_trained is False


def test_without_a_shipped_routing_the_default_model_has_seeded_ones(
    shipped: FlexiDepthForCausalLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "PRETRAINED", tmp_path / "none")
    assert open_checkpoint("smollm2-135m").routers_trained is False


def test_routers_in_half_precision(llama_dir: Path, tmp_path: Path) -> None:
    model = load_trainable(llama_dir, routing={"router_bias": True})
    saved = save_routing(model, tmp_path / "r", base_model=llama_dir, router_dtype=torch.float16)
    stored = load_file(saved / "routing.safetensors")
    for name, tensor in stored.items():
        wide = torch.bfloat16 if ".adapter." in name else torch.float16
        assert tensor.dtype == (torch.float32 if tensor.dim() == 1 else wide), name
    got = {n: p for n, p in load_trainable(saved).named_parameters() if ".router." in n}
    for name, parameter in got.items():
        assert torch.equal(parameter, stored[name].float()), name
    with pytest.raises(DtypeError, match=r"router_dtype is torch\.int8"):
        save_routing(model, tmp_path / "s", base_model=llama_dir, router_dtype=torch.int8)
