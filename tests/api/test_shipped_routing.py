"""The trained routing that comes with the package, on its real base model."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from flexidepth import FlexiDepth
from flexidepth.checkpoints import load_trainable, open_checkpoint, source
from flexidepth.errors import DownloadError

MODEL = "smollm2-135m"
TEXT = (
    "The river rises in the hills above the town and flows north for ninety kilometres before it "
    "reaches the sea. Its valley has been settled since the Bronze Age."
)


@pytest.fixture(scope="module")
def llm() -> Iterator[FlexiDepth]:
    try:
        model = FlexiDepth.from_pretrained(MODEL, dtype="float32", num_threads=1)
    except DownloadError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")
    with model:
        yield model


def test_what_is_shipped_is_small_and_whole() -> None:
    folder = source.PRETRAINED / MODEL
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    content = json.loads((folder / "config.json").read_text())
    assert content["base_model"] == MODEL
    assert (folder / "README.md").read_text().startswith("---\n")  # a model card
    presets = content["skip_presets"]
    assert presets["quality"] < presets["balanced"] < presets["fast"]


def test_where_nothing_is_asked_for_quality_holds(llm: FlexiDepth) -> None:
    unasked = llm.score(TEXT)
    assert torch.equal(unasked.logprobs, llm.score(TEXT, skip="quality").logprobs)
    assert 28 - 1.5 < unasked.mean_layers_used < 30


def test_the_name_alone_means_the_trained_routers(llm: FlexiDepth) -> None:
    assert llm.routers_trained
    assert not open_checkpoint(MODEL, seed=0).routers_trained


def test_every_layer_run_is_the_base_model(llm: FlexiDepth) -> None:
    base = llm.score(TEXT, force_routing="dense")
    torch.testing.assert_close(llm.score(TEXT, force_routing="all").logprobs, base.logprobs)


def test_the_dial_skips_as_much_as_it_says_and_costs_little(llm: FlexiDepth) -> None:
    layers = llm.config.num_hidden_layers
    base = llm.score(TEXT, force_routing="all")
    scores = [llm.score(TEXT, target_layers_skipped=target) for target in (1, 2, 4)]
    skipped = [layers - score.mean_layers_used for score in scores]
    assert skipped == sorted(skipped)
    assert skipped == pytest.approx([1, 2, 4], abs=1.5)
    # As many at random cost several times as much, which is what routers are trained for.
    random = llm.score(TEXT, force_routing=4 / 15)
    cost, at_random = (
        float(base.logprobs.mean() - score.logprobs.mean()) for score in (scores[-1], random)
    )
    assert cost < 0.5 * at_random


def test_engine_and_specification_decide_alike(llm: FlexiDepth) -> None:
    ids = llm.tokenizer(TEXT)["input_ids"]
    model = load_trainable(MODEL)
    model.config.router_thresholds = llm.config.router_thresholds
    with torch.no_grad():
        want = model(torch.tensor([ids]))
    out = llm.generate(ids, max_new_tokens=1, return_routing=True)
    got = out.routing.ran[: len(ids)]
    agreed = (got == want.run[0][: len(got)]).float().mean().item()
    assert 0 < want.run.float().mean() < 1
    assert agreed >= 0.999
