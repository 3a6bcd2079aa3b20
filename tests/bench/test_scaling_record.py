"""Recording of decisions, with a tiny model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexidepth import FlexiDepth
from flexidepth.bench.scaling.record import PROMPTS, record
from flexidepth.bench.scaling.recorded import read_recording
from flexidepth.errors import ValueOutOfRangeError
from tests.checkpoints.tiny import base_model, write_gguf


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlexiDepth]:
    """A model of four layers, two of them routed, whose routers are not trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    source = str(write_gguf(path, base_model(max_position_embeddings=1024)))
    with FlexiDepth.from_pretrained(source, dtype="float32", num_threads=1) as model:
        yield model


class Dialled:
    """A model that takes a dial's settings for shares to skip."""

    routers_trained = True

    def __init__(self, llm: FlexiDepth) -> None:
        self.llm, self.config, self.source = llm, llm.config, llm.source

    def generate(self, prompt: Any, *, skip: str, **arguments: Any) -> Any:
        share = {"none": 0.0, "half": 0.5, "all": 1.0}[skip]
        return self.llm.generate(prompt, force_routing=share, routing_seed=3, **arguments)


def test_decisions_of_every_prompt_at_every_setting(llm: FlexiDepth, tmp_path: Path) -> None:
    prompts = [("list", "hello hello"), ("copy", "hello")]
    said: list[str] = []
    made = record(Dialled(llm), ["none", "half", "all"], 6, "how", said.append, prompts)  # type: ignore[arg-type]
    made.save(tmp_path / "routing.json")
    read = read_recording(tmp_path / "routing.json")
    assert read.routing_layers == list(llm.config.routing_layers) and read.num_layers == 4
    assert read.sha256 == hashlib.sha256(Path(llm.source).read_bytes()).hexdigest()
    for level, share in (("none", 1.0), ("half", 0.5), ("all", 0.0)):
        assert [one.kind for one in read.levels[level]] == ["list", "copy"]
        for one, (_, text) in zip(read.levels[level], prompts, strict=True):
            output = llm.generate(
                [{"role": "user", "content": text}],
                force_routing=1 - share,
                routing_seed=3,
                temperature=0.0,
                max_new_tokens=6,
                return_routing=True,
            )
            assert not isinstance(output, list) and output.routing is not None
            assert one.prompt_length == len(output.prompt_ids)
            assert np.array_equal(one.ran, output.routing.ran.numpy())
            assert one.decoded.mean() == share
    assert len(said) == 3


def test_untrained_routers_are_not_recorded(llm: FlexiDepth) -> None:
    with pytest.raises(ValueOutOfRangeError, match="are not trained"):
        record(llm, ["fast"], 4, "how", print)


def test_prompts_are_of_several_kinds_and_enough_for_the_largest_batch() -> None:
    from flexidepth.bench.scaling.study import BATCHES

    assert len(PROMPTS) >= 2 * max(BATCHES)
    assert len({kind for kind, _ in PROMPTS}) >= 6
    assert len({text for _, text in PROMPTS}) == len(PROMPTS)
