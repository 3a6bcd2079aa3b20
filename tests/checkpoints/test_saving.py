"""Saving: round trips, and an old checkpoint that survives whatever goes wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flexidepth.checkpoints import open_checkpoint, save_checkpoint
from flexidepth.checkpoints.checkpoint import Checkpoint, check_finite, expected_shapes
from flexidepth.errors import CheckpointError, SaveError, ShapeError, ValueOutOfRangeError
from tests.checkpoints.tiny import save_base


@pytest.fixture
def opened(llama_dir: Path) -> Checkpoint:
    return open_checkpoint(
        llama_dir, routing={"router_bias": True, "router_thresholds": [0.25, 0.75]}
    )


@pytest.fixture
def old(opened: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint that something else is to be saved over."""
    return save_checkpoint(opened.config, opened.tensors(), tmp_path / "parent" / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def survives(old: Path) -> Iterator[None]:
    """The checkpoint at `old` is the same afterwards, with nothing left beside it."""
    before, beside = contents(old), sorted(p.name for p in old.parent.iterdir())
    yield
    assert contents(old) == before
    assert sorted(p.name for p in old.parent.iterdir()) == beside


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def replaced(
    checkpoint: Checkpoint, name: str, value: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """The stream with one tensor replaced, or left out."""
    for key, tensor in checkpoint.tensors():
        if key != name:
            yield key, tensor
        elif value is not None:
            yield key, value


@pytest.mark.parametrize("limit", [1, 50_000, 1 << 30])
def test_a_round_trip_changes_nothing(opened: Checkpoint, tmp_path: Path, limit: int) -> None:
    out = save_checkpoint(opened.config, opened.tensors(), tmp_path / "out", max_shard_bytes=limit)
    again = open_checkpoint(out)
    assert again.routers_trained
    assert again.config.to_dict() == {
        **opened.config.to_dict(),
        "architectures": ["FlexiDepthForCausalLM"],
    }
    before, after = dict(opened.tensors()), dict(again.tensors())
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shards_stay_within_their_limit_and_are_indexed(opened: Checkpoint, tmp_path: Path) -> None:
    out = save_checkpoint(
        opened.config, opened.tensors(), tmp_path / "out", max_shard_bytes=100_000
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(out / file).values()) for file in files]
    assert max(sizes) <= 100_000
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weights_may_be_read_by_whom_the_umask_allows(
    opened: Checkpoint, tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        out = save_checkpoint(
            opened.config, opened.tensors(), tmp_path / "out", max_shard_bytes=100_000
        )
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert len(modes) > 3 and set(modes.values()) == {mode}, modes


def test_matrices_are_narrowed_and_routers_and_norms_are_not(
    opened: Checkpoint, tmp_path: Path
) -> None:
    out = save_checkpoint(opened.config, opened.tensors(), tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(out / "model.safetensors")
    for name, tensor in opened.tensors():
        narrow = tensor.dim() == 2 and ".router." not in name
        assert stored[name].dtype == (torch.bfloat16 if narrow else torch.float32), name
        assert torch.equal(stored[name], tensor.to(stored[name].dtype))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_tied_head_is_not_stored_twice(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tie_word_embeddings=True)
    checkpoint = open_checkpoint(tmp_path / "base")
    tensors = dict(checkpoint.tensors())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    out = save_checkpoint(checkpoint.config, tensors.items(), tmp_path / "out")
    assert load_file(out / "model.safetensors").keys() == expected_shapes(checkpoint.config).keys()


def test_layers_may_share_a_weight(opened: Checkpoint, tmp_path: Path) -> None:
    tensors = dict(opened.tensors())
    shared = tensors["model.layers.0.input_layernorm.weight"]
    tensors["model.layers.1.input_layernorm.weight"] = shared
    out = save_checkpoint(opened.config, tensors.items(), tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["model.layers.1.input_layernorm.weight"], shared)


def test_the_config_says_when_routers_are_only_seeded(opened: Checkpoint, tmp_path: Path) -> None:
    out = save_checkpoint(opened.config, opened.tensors(), tmp_path / "out", routers_trained=False)
    again = open_checkpoint(out)
    assert again.routers_trained is False
    assert not hasattr(
        again.config, "routers_trained"
    )  # else it would be saved after training, too


def test_a_model_is_saved_over_another_only_when_asked(old: Path, opened: Checkpoint) -> None:
    with survives(old), pytest.raises(SaveError, match=r"not empty; .*allow overwriting"):
        save_checkpoint(opened.config, opened.tensors(), old)
    save_checkpoint(opened.config, opened.tensors(), old, routers_trained=False, overwrite=True)
    assert open_checkpoint(old).routers_trained is False
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_a_model_can_be_saved_over_the_one_it_is_read_from(old: Path) -> None:
    before = dict(open_checkpoint(old).tensors())
    before = {name: tensor.clone() for name, tensor in before.items()}
    checkpoint = open_checkpoint(old)
    save_checkpoint(checkpoint.config, checkpoint.tensors(), old, overwrite=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in open_checkpoint(old).tensors())


def test_a_link_is_followed_and_stays_a_link(old: Path, opened: Checkpoint, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(old, target_is_directory=True)
    assert save_checkpoint(opened.config, opened.tensors(), link, overwrite=True) == old
    assert link.is_symlink() and (link / "config.json").exists()


def test_a_directory_that_is_no_model_is_never_replaced(opened: Checkpoint, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "diary.txt").write_text("dear")
    with survives(home), pytest.raises(SaveError, match="not a model directory"):
        save_checkpoint(opened.config, opened.tensors(), home, overwrite=True)


def test_a_file_is_no_directory(opened: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file"):
        save_checkpoint(opened.config, opened.tensors(), tmp_path / "file", overwrite=True)
    with pytest.raises(SaveError, match="cannot write in"):
        save_checkpoint(opened.config, opened.tensors(), tmp_path / "file" / "inside")


@pytest.mark.parametrize("size", [0, 1000, 200_000])
def test_the_old_checkpoint_survives_a_full_disk(old: Path, opened: Checkpoint, size: int) -> None:
    with (
        survives(old),
        pytest.raises(SaveError, match=r"writing .* failed: .*; at least \d+ bytes are needed"),
        largest_file(size),
    ):
        save_checkpoint(opened.config, opened.tensors(), old, overwrite=True)


def test_a_disk_that_fills_up_at_the_second_shard(old: Path, opened: Checkpoint) -> None:
    def filling() -> Iterator[tuple[str, Tensor]]:
        for number, item in enumerate(opened.tensors()):
            if number == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            yield item

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with survives(old), pytest.raises(SaveError):
            save_checkpoint(opened.config, filling(), old, overwrite=True, max_shard_bytes=50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_too_little_space_is_said_before_anything_is_written(
    old: Path, opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    with (
        survives(old),
        pytest.raises(SaveError, match=r"needs at least \d{6} bytes, 1000 are free"),
    ):
        save_checkpoint(opened.config, iter(()), old, overwrite=True)


def test_a_directory_without_write_permission(
    old: Path, opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not bind the superuser, as whom tests may run, so the system call is what refuses.
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with (
        survives(old),
        pytest.raises(SaveError, match=f"cannot write in {old.parent}: Permission denied"),
    ):
        save_checkpoint(opened.config, opened.tensors(), old, overwrite=True)


def test_the_old_checkpoint_comes_back_when_the_last_step_fails(
    old: Path, opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def fail_into_place(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_into_place)
    with survives(old), pytest.raises(SaveError, match="Input/output error"):
        save_checkpoint(opened.config, opened.tensors(), old, overwrite=True)


def test_ctrl_c_leaves_nothing_behind(old: Path, opened: Checkpoint) -> None:
    def interrupted() -> Iterator[tuple[str, Tensor]]:
        stream = opened.tensors()
        yield next(stream)
        raise KeyboardInterrupt

    with survives(old), pytest.raises(KeyboardInterrupt):
        save_checkpoint(opened.config, interrupted(), old, overwrite=True)


@pytest.mark.parametrize(
    ("value", "error", "reason"),
    [
        (None, CheckpointError, r"1 tensors missing \(model\.norm\.weight\)"),
        (torch.ones(63), ShapeError, r"model\.norm\.weight is \[63\]; config says \[64\]"),
        (
            torch.full((64,), torch.nan),
            CheckpointError,
            r"model\.norm\.weight: 64 of 64 values are not finite",
        ),
    ],
)
def test_a_wrong_tensor_never_replaces_a_good_checkpoint(
    old: Path, opened: Checkpoint, value: Tensor | None, error: type[Exception], reason: str
) -> None:
    with survives(old), pytest.raises(error, match=reason):
        save_checkpoint(
            opened.config, replaced(opened, "model.norm.weight", value), old, overwrite=True
        )


def test_unexpected_and_repeated_tensors(opened: Checkpoint, tmp_path: Path) -> None:
    tensors = list(opened.tensors())
    with pytest.raises(CheckpointError, match=r"1 unexpected \(extra\)"):
        save_checkpoint(opened.config, [*tensors, ("extra", torch.ones(1))], tmp_path / "out")
    with pytest.raises(CheckpointError, match="came twice"):
        save_checkpoint(opened.config, [*tensors, tensors[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_overflow_the_narrow_type_are_refused(
    opened: Checkpoint, tmp_path: Path
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    large = replaced(opened, name, torch.full((128, 64), 1e6))
    with pytest.raises(CheckpointError, match=f"{name}: 8192 of 8192 values are not finite"):
        save_checkpoint(opened.config, large, tmp_path / "out", dtype=torch.float16)


def test_options_are_checked(opened: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(
        ValueOutOfRangeError, match="layout is 'gguf'; wanted flexidepth or ddllama"
    ):
        save_checkpoint(opened.config, opened.tensors(), tmp_path / "out", layout="gguf")
    with pytest.raises(ValueOutOfRangeError, match="max_shard_bytes is 0"):
        save_checkpoint(opened.config, opened.tensors(), tmp_path / "out", max_shard_bytes=0)
    assert not (tmp_path / "out").exists()


def test_check_finite_names_the_place_and_accepts_large_values() -> None:
    check_finite("large", torch.full((4,), 3e38))  # their sum is infinite, they are not
    wrong = torch.zeros(3, 5)
    wrong[1, 2] = -torch.inf
    with pytest.raises(
        CheckpointError, match=r"x: 1 of 15 values are not finite, the first at \[1, 2\] \(-inf\)"
    ):
        check_finite("x", wrong)
