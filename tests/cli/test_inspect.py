"""flexidepth inspect: its figures are those of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexidepth import FlexiDepth, open_checkpoint
from tests.checkpoints.tiny import save_base
from tests.cli.conftest import Command


def facts(run: Command, model: object) -> dict[str, Any]:
    result = run("inspect", model, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_parts_add_up_to_the_weights(model: str, run: Command) -> None:
    parts = facts(run, model)["parts"]
    tensors = dict(open_checkpoint(model).tensors())
    router = sum(t.numel() for name, t in tensors.items() if ".router." in name)
    adapter = sum(t.numel() for name, t in tensors.items() if ".adapter." in name)
    assert parts["routers"] == {"parameters": router, "bytes": 4 * router}
    assert parts["adapters"] == {"parameters": adapter, "bytes": 2 * adapter}
    assert parts["total"]["parameters"] == sum(t.numel() for t in tensors.values())
    assert parts["head"]["parameters"] == tensors["lm_head.weight"].numel()
    assert parts["embeddings"]["parameters"] == tensors["model.embed_tokens.weight"].numel()


def test_tied_embeddings_are_counted_once_as_the_head(run: Command, tmp_path: Path) -> None:
    save_base(tmp_path / "tied", tie_word_embeddings=True)
    parts = facts(run, tmp_path / "tied")["parts"]
    assert parts["embeddings"]["parameters"] == 0
    assert parts["head"]["parameters"] == 320 * 64


def test_routing_and_tokenizer(model: str, run: Command, tmp_path: Path) -> None:
    content = facts(run, model)
    assert content["routing"]["layers"] == [2, 3]
    assert content["routing"]["thresholds"] == [0.5, 0.5]
    assert content["routing"]["routers"] == "seeded, not trained"
    assert content["tokenizer"]["chat_template"] is True
    cost = content["bytes_per_token"]
    assert cost["every_routed_layer_skipped"] < cost["dense"] < cost["every_layer_run"]
    save_base(tmp_path / "bare")
    assert facts(run, tmp_path / "bare")["tokenizer"] is None


def test_memory_is_what_the_engine_takes(model: str, run: Command) -> None:
    memory = facts(run, model)["memory"]
    for dtype in ("bfloat16", "float32"):
        with FlexiDepth.from_pretrained(model, dtype=dtype, num_threads=1) as llm:
            taken = llm.engine.weight_bytes
            assert 0.9 * taken < memory[f"weights_{dtype}"] <= taken
    config = open_checkpoint(model).config
    width = config.num_key_value_heads * config.head_dim
    assert memory["cache_bfloat16_per_token"] == config.num_hidden_layers * 2 * width * 2


def test_readable(model: str, run: Command) -> None:
    text = run("inspect", model).stdout
    for piece in ("routed layers              2-3 (2)", "thresholds                 0.5\n", model):
        assert piece in text
    assert "with chat template" in text


def test_converted_model_generates_like_its_base(model: str, run: Command, tmp_path: Path) -> None:
    out = tmp_path / "converted"
    result = run(
        "convert", model, out, "--layers", "1,3", "--threshold", "0.25", "--dtype", "float32"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    routing = facts(run, out)["routing"]
    assert routing["layers"] == [1, 3]
    assert routing["thresholds"] == [0.25, 0.25]
    answers = []
    for source in (model, out):
        with FlexiDepth.from_pretrained(source, dtype="float32", num_threads=1) as llm:
            answers.append(llm.generate("hello", max_new_tokens=8, force_routing="all").token_ids)
    assert answers[0] == answers[1]


def test_convert_keeps_the_routing_it_is_not_told_to_change(
    model: str, run: Command, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--layers", "1-2", "--threshold", "0.25", "--gate", "straight_through")
    assert run("convert", model, first, *options).exit_code == 0
    result = run("convert", first, second)
    assert result.exit_code == 0, result.output
    assert facts(run, second)["routing"] == facts(run, first)["routing"]


def test_convert_refuses_what_exists_and_what_it_cannot_read(
    model: str, run: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("convert", model, out).exit_code == 0
    again = run("convert", model, out)
    assert again.exit_code == 1
    assert "exists and is not empty" in again.stderr
    assert run("convert", model, out, "--overwrite", "--layers", "none").exit_code == 0
    assert facts(run, out)["routing"]["routers"] == "none"
    for layers in ("3-1", "x", "1,,2"):
        wrong = run("convert", model, tmp_path / "other", "--layers", layers)
        assert wrong.exit_code == 2
        assert "15-29" in wrong.stderr
    assert run("convert", model, tmp_path / "other", "--layers", "9").exit_code == 1
    assert not (tmp_path / "other").exists()
