"""What a model's name may be, and what is said when it is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flexidepth.checkpoints import default_model, open_checkpoint, resolve_model
from flexidepth.errors import CheckpointError, DownloadError, ModelNotFoundError
from tests.checkpoints.tiny import base_model, write_gguf

# Read before the fixtures point elsewhere; the test below never fetches.
_USERS_FILE = default_model.default_model_path()


@pytest.mark.parametrize(
    "name", ["nothing", "/no/such/dir", "./missing", "a/b/c", "dir/model.gguf", "smollm"]
)
def test_a_name_that_is_nothing_lists_what_it_could_be(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no such directory or file.*'smollm2-135m'"):
        resolve_model(name)


def test_a_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model") == Path("org/model")


def test_a_hub_id_is_fetched_with_its_safetensors_only(
    llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(llama_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert open_checkpoint("org/model").source == str(llama_dir)
    ((repo_id, patterns),) = asked
    assert repo_id == "org/model"
    assert "*.safetensors" in patterns and "*.bin" not in patterns


def test_a_hub_out_of_reach_names_the_ways_out() -> None:
    with pytest.raises(
        DownloadError,
        match=r"org/model: no such path, and .* \(OSError: no route to the hub\).*pass the path",
    ):
        resolve_model("org/model")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(
        CheckpointError, match=r"not a GGUF file.*the directory of a Hugging Face model"
    ):
        open_checkpoint(path)


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_checkpoint(tmp_path)


def test_tensors_can_be_streamed_more_than_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", base_model()))
    first, second = dict(checkpoint.tensors()), dict(checkpoint.tensors())
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.skipif(not _USERS_FILE.exists(), reason="the default model is not in the user's cache")
def test_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXIDEPTH_CACHE", os.fspath(_USERS_FILE.parent))
    checkpoint = open_checkpoint("smollm2-135m")
    config = checkpoint.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config.bos_token_id, config.eos_token_id, config.tie_word_embeddings) == (1, 2, True)
    assert config.routing_layers == list(range(15, 30))
    base = sum(
        t.numel() for n, t in checkpoint.tensors() if ".router." not in n and ".adapter." not in n
    )
    assert base == 134_515_008
    tokenizer = checkpoint.tokenizer()
    # Made by llama.cpp from the same file; digits come one by one.
    assert tokenizer("In 1984 it's 3.14!")["input_ids"] == [
        788,
        216,
        33,
        41,
        40,
        36,
        357,
        506,
        216,
        35,
        30,
        33,
        36,
        17,
    ]
    assert tokenizer.eos_token == "<|im_end|>"


def test_gguf_is_wanted_by_gguf_files_alone(tmp_path: Path) -> None:
    """Everything else is imported without the package, as on a machine that does not have it."""
    path = write_gguf(tmp_path / "model.gguf", base_model())
    code = (
        "import sys\n"
        "for name in ('gguf', 'gguf.constants', 'gguf.quants'):\n"
        "    sys.modules[name] = None\n"
        "import flexidepth.checkpoints.source, bench.gpu.engine_run, bench.gpu_check\n"
        "from flexidepth.checkpoints import open_checkpoint\n"
        "from flexidepth.errors import UnsupportedError\n"
        "try:\n"
        "    open_checkpoint(sys.argv[1])\n"
        "except UnsupportedError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert f"{path}: " in result.stdout and "pip install gguf" in result.stdout
