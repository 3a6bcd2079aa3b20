"""save_pretrained: the old checkpoint survives whatever goes wrong, other files stay, arguments work."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from flexidepth import open_checkpoint
from flexidepth.errors import SaveError, UnsupportedError
from flexidepth.modeling import FlexiDepthForCausalLM, FlexiDepthModel

from ..engine.conftest import tiny_config, tiny_model


@pytest.fixture
def model() -> FlexiDepthForCausalLM:
    return tiny_model(tiny_config())


@pytest.fixture
def old(model: FlexiDepthForCausalLM, tmp_path: Path) -> Path:
    """A saved model with a tokenizer and a folder of somebody's beside it."""
    folder = tmp_path / "parent" / "model"
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "state").write_text("kept")
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # what is saved next is another model
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path under `folder` with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@contextmanager
def survives(old: Path) -> Iterator[None]:
    before = tree(old.parent)
    yield
    assert tree(old.parent) == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_the_old_model_survives_a_full_disk(
    model: FlexiDepthForCausalLM, old: Path, size: int
) -> None:
    with (
        survives(old),
        pytest.raises(SaveError, match=rf"writing {old} failed: .*untouched; free space or choose"),
        largest_file(size),
    ):
        model.save_pretrained(old)


def test_a_disk_that_fills_up_behind_the_first_shard(
    model: FlexiDepthForCausalLM, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.modeling_utils as hf

    write, calls = hf.safe_save_file, []

    def filling(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        (write if len(calls) == 1 else no_space)(*arguments, **options)

    monkeypatch.setattr(hf, "safe_save_file", filling)
    with survives(old), pytest.raises(SaveError, match="No space left on device"):
        model.save_pretrained(old, max_shard_size="100KB")
    assert len(calls) == 2


def test_a_new_directory_is_not_left_half_written(
    model: FlexiDepthForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(SaveError, match=r"at least \d{6} bytes are needed"), largest_file(1000):
        model.save_pretrained(tmp_path / "a" / "b")
    assert not list((tmp_path / "a").iterdir())


def test_a_directory_without_write_permission(
    model: FlexiDepthForCausalLM, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not bind the superuser, as whom tests may run, so the system call is what refuses.
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with (
        survives(old),
        pytest.raises(SaveError, match=f"cannot write in {old}: Permission denied; choose"),
    ):
        model.save_pretrained(old)
    with pytest.raises(SaveError, match=f"cannot write in {tmp_path}: Permission denied"):
        model.save_pretrained(tmp_path / "new")


def test_a_file_is_no_directory(model: FlexiDepthForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file; give a directory"):
        model.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("number", range(6))
def test_a_step_of_the_swap_that_fails_is_undone(
    model: FlexiDepthForCausalLM, old: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rename, calls = os.rename, []

    def failing(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == number + 1:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with survives(old), pytest.raises(SaveError, match="Input/output error"):
        model.save_pretrained(old)


@torch.no_grad()
def test_other_files_stay_and_the_model_is_replaced(
    model: FlexiDepthForCausalLM, old: Path, ids: torch.Tensor
) -> None:
    before = tree(old)
    model.save_pretrained(old)
    after = tree(old)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"model.safetensors"}
    again = FlexiDepthForCausalLM.from_pretrained(old)
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_no_weights_of_an_earlier_save_are_read(
    model: FlexiDepthForCausalLM, old: Path, ids: torch.Tensor
) -> None:
    for size in ("100KB", "200KB", "1GB"):
        model.lm_head.weight.add_(1)
        model.save_pretrained(old, max_shard_size=size)
        again = FlexiDepthForCausalLM.from_pretrained(old)
        assert torch.equal(again(ids).logits, model(ids).logits)
        head = dict(open_checkpoint(old).tensors())["model.embed_tokens.weight"]
        assert torch.equal(head, model.lm_head.weight)
    assert [path.name for path in old.glob("model*")] == ["model.safetensors"]


def test_files_have_the_mode_of_the_umask(model: FlexiDepthForCausalLM, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_a_state_dict_and_a_variant(model: FlexiDepthForCausalLM, old: Path) -> None:
    before = tree(old)
    state = {name: torch.full_like(t, 0.5) for name, t in model.state_dict().items()}
    model.save_pretrained(old, True, state, variant="half")
    assert tree(old).keys() - before.keys() == {"model.half.safetensors"}
    assert tree(old)["model.safetensors"] == before["model.safetensors"]
    again = FlexiDepthForCausalLM.from_pretrained(old, variant="half")
    assert bool((again.lm_head.weight == 0.5).all())


def test_only_the_main_process_writes(model: FlexiDepthForCausalLM, old: Path) -> None:
    with survives(old):
        model.save_pretrained(old, is_main_process=False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"safe_serialization": False}, "safe_serialization=False, .*: leave it True"),
        ({"distributed_checkpoint": True}, "leave it False"),
        ({"push_to_hub": True, "variant": "x"}, "together with variant; .*upload_folder"),
        ({"push_to_hub": True, "state_dict": {}}, "together with state_dict; .*upload_folder"),
    ],
)
def test_what_is_not_done_is_refused(
    model: FlexiDepthForCausalLM, old: Path, arguments: dict[str, Any], reason: str
) -> None:
    with survives(old), pytest.raises(UnsupportedError, match=reason):
        model.save_pretrained(old, **arguments)


def test_an_upload_follows_the_save(
    model: FlexiDepthForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def push(self: Any, repo_id: str, **options: Any) -> None:
        assert (tmp_path / "name" / "model.safetensors").exists()
        calls.append((repo_id, options))

    monkeypatch.setattr(FlexiDepthForCausalLM, "push_to_hub", push)
    model.save_pretrained(tmp_path / "name", push_to_hub=True, private=True, max_shard_size="1GB")
    model.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="me/it")
    assert calls == [("name", {"private": True, "max_shard_size": "1GB"}), ("me/it", {})]


def test_the_model_without_a_head_and_the_trainer_save_the_same_way(
    model: FlexiDepthForCausalLM, old: Path, tmp_path: Path
) -> None:
    inner: FlexiDepthModel = model.model
    with survives(old), pytest.raises(SaveError), largest_file(1000):
        inner.save_pretrained(old)
    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)
    with survives(old), pytest.raises(SaveError), largest_file(1000):
        Trainer(model=model, args=arguments).save_model(str(old))
    Trainer(model=model, args=arguments).save_model(str(old))
    saved = dict(open_checkpoint(old).tensors())
    assert torch.equal(saved["model.embed_tokens.weight"], model.lm_head.weight)
