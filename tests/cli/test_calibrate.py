"""flexidepth calibrate and merge: a routing checkpoint gets its dial, and becomes a whole model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flexidepth import FlexiDepth, load_trainable, open_checkpoint, save_routing
from flexidepth.checkpoints.config_file import update_config
from flexidepth.errors import SaveError
from tests.checkpoints.test_saving import contents, survives
from tests.cli.conftest import Command

TEXT = "hello 123 it's (ca; hello\n\n"


@pytest.fixture
def routing(model: str, tmp_path: Path) -> Path:
    """Routers that decide differently from token to token, on the tiny model."""
    trained = load_trainable(model, routing={"routing_layers": [1, 2, 3]})
    return save_routing(trained, tmp_path / "made" / "routing", base_model=model)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = TEXT.split(" ")
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(words), (400,), generator=generator).tolist()
    path = tmp_path / "held-out.jsonl"
    rows: list[dict[str, Any]] = [
        {"text": " ".join(words[i] for i in order[start : start + 50])}
        for start in range(0, 400, 50)
    ]
    rows.append({"messages": [{"role": "user", "content": TEXT * 20}]})
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_a_routing_checkpoint_gets_its_dial(run: Command, routing: Path, data: Path) -> None:
    before = contents(routing)
    result = run("calibrate", routing, "--data", data, "--targets", "0.5,1.5,2.25", "-t", 1)
    assert result.exit_code == 0, result.output
    table = [line.split() for line in result.stdout.splitlines()]
    assert table[0] == ["layers", "wanted", "got", "threshold"]
    assert [row[0] for row in table[1:]] == ["0.50", "1.50", "2.25"]
    assert all(abs(float(row[0]) - float(row[1])) <= 0.0205 for row in table[1:])
    assert "presets: quality 2" in result.stderr
    said = re.search(r"where nothing is asked for (\d\.\d\d) layers are skipped", result.stderr)
    assert said is not None and 0 < float(said[1]) < 3
    after = contents(routing)
    assert after.keys() == before.keys()
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    points = new.pop("calibration")
    assert new.pop("skip_presets") == {"quality": 2.0}
    assert new == {k: v for k, v in old.items() if k not in ("calibration", "skip_presets")}
    assert [f"{p['thresholds'][0]:.4f}" for p in points] == [row[2] for row in table[1:]]
    assert old["calibration"] == []

    inspected = run("inspect", routing)
    assert "quality (2 layers); calibrated for 0." in inspected.stdout
    assert f"llama, from {old['base_model']}" in inspected.stdout
    facts = json.loads(run("inspect", routing, "--json").stdout)["routing"]
    assert facts["skip_presets"] == {"quality": 2.0}
    assert facts["calibrated_layers_skipped"] == [p["layers_skipped"] for p in points]


def test_what_holds_where_nothing_is_asked_for(run: Command, routing: Path, data: Path) -> None:
    calibrate = ("calibrate", routing, "--data", data, "--targets", "0.5,2.25", "-t", 1)
    with survives(routing):
        wrong = run(*calibrate, "--default", "fast")
        assert wrong.exit_code == 1 and "no preset 'fast'; this model has: quality" in wrong.stderr
    result = run(*calibrate, "--default", "quality")
    assert result.exit_code == 0 and "where nothing is asked for: quality" in result.stderr
    with FlexiDepth.from_pretrained(routing, dtype="float32", num_threads=1) as llm:
        unasked, asked, other = (
            llm.score(TEXT * 8, **how)
            for how in ({}, {"skip": "quality"}, {"target_layers_skipped": 0.5})
        )
    assert torch.equal(unasked.logprobs, asked.logprobs)
    assert unasked.mean_layers_used < other.mean_layers_used


def test_several_files_give_as_much_each(
    run: Command, routing: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexidepth.training import calibration_text

    given: list[tuple[int, int]] = []
    whole = calibration_text.token_sequences

    def watched(documents: Any, *arguments: Any, **options: Any) -> Any:
        sequences = whole(documents, *arguments, **options)
        given.append((options["tokens"], sum(len(sequence.ids) for sequence in sequences)))
        return sequences

    monkeypatch.setattr(calibration_text, "token_sequences", watched)
    other = tmp_path / "other.txt"
    other.write_text(TEXT * 40)
    two = ("--data", data, "--data", other)
    result = run("calibrate", routing, *two, "--tokens", 101, "--targets", "1.5", "-t", 1)
    assert result.exit_code == 0, result.output
    assert given == [(51, 51), (51, 51)] and "measured on 102 tokens" in result.stderr


def test_a_calibrated_model_takes_the_dial(run: Command, routing: Path, data: Path) -> None:
    assert run("calibrate", routing, "--data", data, "-t", 1).exit_code == 0
    update_config(routing, {"skip_presets": {"little": 0.5, "much": 2.0}})
    generate = ("generate", routing, "hello hello", "--max-new-tokens", 30, "-t", 1, "--json")

    def used(*options: object) -> float:
        result = run(*generate, "--eos-token-id", 319, *options)  # as good as none
        assert result.exit_code == 0, result.output
        return float(json.loads(result.stdout)["metrics"]["mean_layers_used"])

    assert used("--skip", "much") < used("--skip", "little")
    assert used("--target-layers-skipped", 2) == used("--skip", "much")
    wrong = run(*generate, "--skip", "all-layers")
    assert wrong.exit_code == 1
    assert "no preset 'all-layers'; this model has: little, much" in wrong.stderr
    assert "give one of them" in run(*generate, "--skip", "much", "--skip-threshold", 0.5).stderr
    # Said before the first question is read.
    chat = run("chat", routing, "--target-layers-skipped", 2.5, "-t", 1, text="hello\n")
    assert chat.exit_code == 1 and chat.stdout == ""
    assert re.search(
        r"calibrated for 0\.(4[89]|5[0-2]) to (1\.9[89]|2\.0[0-2]) layers", chat.stderr
    )
    spoken = run("chat", routing, "--skip", "much", "--max-new-tokens", 3, "-t", 1, text="hello\n")
    assert spoken.exit_code == 0 and " of 4 layers" in spoken.stderr


def test_calibrating_again_keeps_the_names_that_are_reached(
    run: Command, routing: Path, data: Path
) -> None:
    options = ("--data", data, "-t", 1, "--targets")
    assert run("calibrate", routing, *options, "0.5,2.5").exit_code == 0
    update_config(routing, {"skip_presets": {"mine": 1.0, "much": 2.5}})
    assert run("calibrate", routing, *options, "0.5,1.5").exit_code == 0
    assert open_checkpoint(routing).config.skip_presets == {"mine": 1.0}


def test_what_fails_leaves_the_checkpoint_as_it_was(
    run: Command, routing: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with survives(routing):
        result = run("calibrate", routing, "--data", data, "--targets", "1,9", "-t", 1)
        assert result.exit_code == 1
        assert "target 9.0; wanted 0 to 3 layers" in result.stderr
        few = run("calibrate", routing, "--data", data, "--tokens", 1, "-t", 1)
        assert "give more text" in few.stderr
        assert run("calibrate", routing, "--data", data, "--targets", "a").exit_code == 2

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with survives(routing), pytest.raises(SaveError, match=r"No space left.*it is untouched"):
        update_config(routing, {"skip_presets": {}})


def test_a_model_whose_configuration_has_no_place_for_it(
    run: Command, model: str, data: Path, tmp_path: Path
) -> None:
    for layout, reason in (("ddllama", "model_type is 'ddllama'"), ("flexidepth", None)):
        assert run("convert", model, tmp_path / layout, "--layout", layout).exit_code == 0
        result = run("calibrate", tmp_path / layout, "--data", data, "--targets", 1, "-t", 1)
        if reason is not None:
            assert result.exit_code == 1 and reason in result.stderr
    assert len(open_checkpoint(tmp_path / "flexidepth").config.calibration) == 1
    assert "no such directory" in run("calibrate", "smollm2-135m", "--data", data).stderr
    assert "no such directory" in run("calibrate", model, "--data", data).stderr


def test_merge_writes_a_whole_model_with_its_dial(
    run: Command, routing: Path, data: Path, tmp_path: Path
) -> None:
    assert run("calibrate", routing, "--data", data, "--targets", "1,2", "-t", 1).exit_code == 0
    out = tmp_path / "whole"
    result = run("merge", routing, out, "--dtype", "float32")
    assert (result.exit_code, result.stdout) == (0, f"{out}\n"), result.output
    assert open_checkpoint(out).config.calibration == open_checkpoint(routing).config.calibration
    answers = []
    for source in (routing, out):
        with FlexiDepth.from_pretrained(source, dtype="float32", num_threads=1) as llm:
            answers.append(llm.generate("hello", max_new_tokens=8, skip="quality").token_ids)
    assert answers[0] == answers[1]
    assert "no routing checkpoint" in run("merge", out, tmp_path / "third").stderr
    assert run("merge", routing, tmp_path / "third", "--dtype", "int4").exit_code == 2


def test_the_demo_lets_trained_routers_decide(
    run: Command, routing: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("flexidepth.cli.demo._ROUNDS", 1)
    demo = ("demo", routing, "--max-new-tokens", 4, "-t", 1)
    result = run(*demo)
    assert result.exit_code == 0, result.output
    assert "--- the routers decide ---" in result.stdout
    assert run("calibrate", routing, "--data", data, "--targets", "1,2", "-t", 1).exit_code == 0
    result = run(*demo)
    assert result.exit_code == 0, result.output
    assert "the routers decide, quality: about 2 layers skipped a token" in result.stdout
    assert "balanced" not in result.stdout and "not trained" not in result.stdout
