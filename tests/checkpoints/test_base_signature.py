"""The sample of a base model's weights in a routing checkpoint: other weights of the same norms are refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from typer.testing import CliRunner

from flexidepth.bench import shipped_form
from flexidepth.checkpoints import load_trainable, merge, open_checkpoint, save_routing
from flexidepth.checkpoints.checkpoint import expected_shapes, some_rows
from flexidepth.checkpoints.config_file import update_config
from flexidepth.checkpoints.fingerprint import (
    SIGNATURE_TOLERANCE,
    base_signature,
    signature_distance,
)
from flexidepth.cli.app import app
from flexidepth.errors import CheckpointError
from tests.checkpoints.test_routing_checkpoint import trained_model
from tests.checkpoints.tiny import base_model, save_base, write_gguf

REFUSED = "trained on another base model"


@pytest.fixture
def saved(llama_dir: Path, tmp_path: Path) -> Path:
    return save_routing(trained_model(llama_dir), tmp_path / "routing", base_model=llama_dir)


def changed_base(
    folder: Path, changed: Callable[[str], bool], kind: str = "llama", **sizes: Any
) -> Path:
    """The tiny base model, in which other random weights of the same size stand where `changed` says."""
    model = base_model(kind, **sizes)
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and changed(name):
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def content_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def without_signature(directory: Path) -> None:
    """Make it one that was saved before there were signatures."""
    content = content_of(directory)
    del content["base_signature"]
    (directory / "config.json").write_text(json.dumps(content))


def signature_of(path: Path | str) -> tuple[Any, str]:
    checkpoint = open_checkpoint(path, routing={"routing_layers": []})
    shapes = expected_shapes(checkpoint.config, routing=False)
    return shapes, base_signature(shapes, checkpoint.read_stored)


def test_other_projections_under_the_same_norms_are_refused(saved: Path, tmp_path: Path) -> None:
    other = changed_base(tmp_path / "other", lambda name: "_proj" in name)
    want = content_of(saved)["base_fingerprint"]
    with pytest.raises(CheckpointError, match=REFUSED) as caught:
        merge(saved, tmp_path / "whole", base_model=other)
    text = str(caught.value)
    distance = re.search(r"distance in \S+.* is (\d\.\d\d)", text)
    assert distance is not None and 1.0 < float(distance[1]) < 2.0
    assert (
        f"may make it {SIGNATURE_TOLERANCE}." in text
        and str(other) in text
        and "--base-model" in text
    )
    assert "train a routing on this one" in text
    assert not (tmp_path / "whole").exists()
    own = save_routing(trained_model(other), tmp_path / "own", base_model=other)
    assert content_of(own)["base_fingerprint"] == want  # which the norms alone would not tell


def test_the_commands_refuse_it(saved: Path, tmp_path: Path) -> None:
    other = changed_base(tmp_path / "other", lambda name: "_proj" in name)
    for words in (["merge", saved, tmp_path / "whole"], ["generate", saved, "hello"]):
        arguments = [str(word) for word in (*words, "--base-model", other)]
        result = CliRunner().invoke(app, arguments, prog_name="flexidepth")
        assert result.exit_code == 1 and REFUSED in " ".join(result.output.split()), result.output


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("embed_tokens", "embed_tokens"),
        ("lm_head", "lm_head"),
        ("layers.2.", "layer 2"),
        *((f"{kind}_proj", f"{kind}_proj") for kind in ("q", "k", "v", "o", "gate", "up", "down")),
    ],
)
def test_one_part_is_enough(saved: Path, tmp_path: Path, part: str, where: str) -> None:
    other = changed_base(tmp_path / "other", lambda name: part in name)
    with pytest.raises(CheckpointError, match=rf"distance in {where} is"):
        open_checkpoint(saved, base_model=other)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_is_refused_though_all_norms_are_one(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    for number, name in enumerate(("first", "second")):
        model = base_model(kind, tie_word_embeddings=tied)
        torch.manual_seed(number)
        model.init_weights()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.fill_(1.0) if "norm" in key else parameter.normal_(std=0.02)
        model.save_pretrained(tmp_path / name)
    first, second = tmp_path / "first", tmp_path / "second"
    saved = save_routing(trained_model(first), tmp_path / "routing", base_model=first)
    assert open_checkpoint(saved).base == str(first)
    with pytest.raises(CheckpointError, match=REFUSED):
        open_checkpoint(saved, base_model=second)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0])
def test_other_forms_of_the_same_model_are_the_same_base(
    tmp_path: Path, arch: str, kind: Kind
) -> None:
    save_base(tmp_path / "base", arch)
    saved = save_routing(
        trained_model(tmp_path / "base"), tmp_path / "routing", base_model=tmp_path / "base"
    )
    file = write_gguf(tmp_path / "other.gguf", base_model(arch), kind)
    assert open_checkpoint(saved, base_model=file).base == str(file)
    shapes, other = signature_of(file)
    distance, _ = signature_distance(shapes, content_of(saved)["base_signature"], other)
    assert distance < 0.4 * SIGNATURE_TOLERANCE
    back = save_routing(trained_model(file), tmp_path / "back", base_model=file)
    assert open_checkpoint(back, base_model=tmp_path / "base").base == str(tmp_path / "base")


def test_a_signature_is_the_same_whatever_holds_the_weights(tmp_path: Path) -> None:
    save_base(tmp_path / "one")
    save_base(tmp_path / "shards", max_shard_size="50KB")
    file = write_gguf(tmp_path / "file.gguf", base_model())
    found = {signature_of(path)[1] for path in (tmp_path / "one", tmp_path / "shards", file)}
    assert len(found) == 1


def test_where_the_sample_is_taken() -> None:
    """A change of the places would refuse every routing that was saved before it."""
    shapes = {
        "model.embed_tokens.weight": (300, 200),
        "model.layers.0.input_layernorm.weight": (200,),
        "model.layers.0.self_attn.q_proj.weight": (150, 200),
        "model.norm.weight": (200,),
    }

    def read(names: Any, rows: Any = None) -> Any:
        for name in names:  # each value tells its place, exactly in float16
            row, column = (torch.arange(size) for size in shapes[name])
            tensor = torch.where(column % 2 == 0, row[:, None], column).float()
            yield some_rows(name, tensor, rows)

    digest = hashlib.sha256(base_signature(shapes, read).encode()).hexdigest()
    assert digest[:16] == "e88bca4a643d033e"


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [None, Kind.F32, Kind.F16, Kind.Q4_1])
def test_single_rows_are_those_of_the_whole_tensor(
    tmp_path: Path, arch: str, kind: Kind | None
) -> None:
    path = tmp_path / "base"
    if kind is None:
        save_base(path, arch)
    else:
        path = write_gguf(tmp_path / "base.gguf", base_model(arch), kind)
    checkpoint = open_checkpoint(path, routing={"routing_layers": []})
    whole = dict(checkpoint.tensors())
    rows = {
        name: [*range(tensor.shape[0] - 1, -1, -3), 5, 5]
        for name, tensor in whole.items()
        if tensor.dim() == 2
    }
    for name, found in zip(whole, checkpoint.read_stored(whole, rows), strict=True):
        want = whole[name][rows[name]] if name in rows else whole[name]
        assert torch.equal(found, want), name


def test_a_routing_checkpoint_gives_single_rows_of_both(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    whole = dict(checkpoint.tensors())
    rows = {"model.layers.1.router.enc.weight": [1, 0], "model.layers.1.mlp.up_proj.weight": [7]}
    for name, found in zip(rows, checkpoint.read_stored(rows, rows), strict=True):
        assert torch.equal(found, whole[name][rows[name]])


def test_a_checkpoint_from_before_there_were_signatures_loads(saved: Path, tmp_path: Path) -> None:
    without_signature(saved)
    assert open_checkpoint(saved).routers_trained
    other = changed_base(tmp_path / "other", lambda name: "_proj" in name)
    assert open_checkpoint(saved, base_model=other).base == str(other)


@pytest.mark.parametrize(
    ("signature", "message"),
    [("no base64!", "is damaged"), (7, "is damaged"), ("AAA=", "has 1 values; its sizes want ")],
)
def test_a_damaged_signature_is_told(saved: Path, signature: object, message: str) -> None:
    content = content_of(saved)
    (saved / "config.json").write_text(json.dumps({**content, "base_signature": signature}))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(saved)
    assert str(saved) in str(caught.value) and "save it again" in str(caught.value)


def test_it_stays_with_the_routing_and_goes_into_no_whole_model(
    saved: Path, tmp_path: Path
) -> None:
    before = content_of(saved)["base_signature"]
    update_config(saved, {"router_thresholds": [0.5, 0.5]})
    assert content_of(saved)["base_signature"] == before
    assert "base_signature" not in open_checkpoint(saved).config.to_dict()
    assert "base_signature" not in content_of(merge(saved, tmp_path / "whole"))


def test_the_same_weights_in_half_precision_sign_as_the_stored_ones(
    llama_dir: Path, tmp_path: Path
) -> None:
    """What training in bfloat16 saves, which is given the hash of the stored norms."""
    stored = save_routing(trained_model(llama_dir), tmp_path / "a", base_model=llama_dir)
    narrow = load_trainable(stored, dtype=torch.bfloat16)
    saved = save_routing(
        narrow,
        tmp_path / "b",
        base_model=llama_dir,
        fingerprint=content_of(stored)["base_fingerprint"],
    )
    assert open_checkpoint(saved).base == str(llama_dir)


def test_the_shipped_form_of_an_old_one_gets_a_signature(saved: Path, tmp_path: Path) -> None:
    before = content_of(saved)["base_signature"]
    without_signature(saved)
    shipped_form.main(saved, tmp_path / "out")
    assert content_of(tmp_path / "out")["base_signature"] == before
