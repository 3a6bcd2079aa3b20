"""The baselines: layers that are gone, layers drawn at random, block influence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

from flexidepth import FlexiDepth
from flexidepth.base_model import base_model_of
from flexidepth.checkpoints import Checkpoint
from flexidepth.evaluation.ablation import without_adapters
from flexidepth.evaluation.influence import block_influence
from flexidepth.evaluation.points import (
    Point,
    base_point,
    dropping_points,
    random_adapter_points,
    random_points,
)
from flexidepth.evaluation.static_layers import greedy_order, skipping_order
from flexidepth.evaluation.windows import trace_windows
from flexidepth.loading import load_engine

from .conftest import all_counted


@pytest.fixture
def ablated(checkpoint: Checkpoint) -> Iterator[FlexiDepth]:
    bare = without_adapters(checkpoint)
    engine = load_engine(bare, torch.float32, num_threads=1, strict_router=False, progress=None)
    with FlexiDepth(engine, bare.config, None, routers_trained=False, source="test") as llm:
        yield llm


def test_with_every_layer_run_it_is_the_base_model(
    llm: FlexiDepth, ablated: FlexiDepth, windows: list[list[int]]
) -> None:
    base = trace_windows(llm.engine, all_counted(windows), base_point())
    assert torch.equal(
        trace_windows(ablated.engine, all_counted(windows), base_point()).logprobs, base.logprobs
    )
    (nothing,) = random_points([0], [1, 2, 3], ablated.config, seed=0, positions=300)
    assert torch.equal(
        trace_windows(ablated.engine, all_counted(windows), nothing).logprobs, base.logprobs
    )


@torch.no_grad()
@pytest.mark.parametrize("dropped", [[0], [2], [1, 3]])
def test_a_dropped_layer_is_gone(
    checkpoint: Checkpoint, ablated: FlexiDepth, windows: list[list[int]], dropped: list[int]
) -> None:
    model = base_model_of(checkpoint.config, checkpoint.tensors())
    model.model.layers = nn.ModuleList(
        layer for i, layer in enumerate(model.model.layers) if i not in dropped
    )
    table = model(torch.tensor([windows[1]]), use_cache=False).logits[0].log_softmax(-1)
    want = table[:-1].gather(1, torch.tensor(windows[1][1:])[:, None])[:, 0]
    influence = [0.0 if layer in dropped else 1.0 for layer in range(4)]
    (point,) = dropping_points("shortgpt", [len(dropped)], influence, range(4))
    assert point.details == {"dropped": dropped} and not point.same_as_base
    trace = trace_windows(ablated.engine, all_counted([windows[1]]), point)
    torch.testing.assert_close(trace.logprobs, want, rtol=1e-4, atol=1e-4)
    assert trace.skipped == len(dropped)


def test_layers_are_dropped_in_the_order_of_their_influence() -> None:
    influence = [0.1, 0.4, 0.2, 0.3]
    points = dropping_points("shortgpt", [0, 1, 2, 3], influence, range(4))
    assert [p.details["dropped"] for p in points] == [[], [0], [0, 2], [0, 2, 3]]
    assert [p.force for p in points] == [[0, 1, 2, 3], [1, 2, 3], [1, 3], [1]]
    assert [p.same_as_base for p in points] == [True, False, False, False]
    (point,) = dropping_points("shortgpt-routed", [2], influence, [1, 2, 3])
    assert point.details["dropped"] == [2, 3]


def test_every_token_skips_exactly_so_many_of_the_routed_layers(
    ablated: FlexiDepth, windows: list[list[int]]
) -> None:
    points = random_points([1, 2], [1, 2, 3], ablated.config, seed=3, positions=300)
    for point, count in zip(points, (1, 2), strict=True):
        mask = point.force
        assert isinstance(mask, torch.Tensor) and mask.shape == (300, 4)
        assert (mask.sum(1) == 4 - count).all() and (mask[:, 0] == 1).all()
        assert len(mask.unique(dim=0)) == 3  # each of the three ways occurs
        assert trace_windows(ablated.engine, all_counted(windows), point).skipped == count
    (again,) = random_points([1], [1, 2, 3], ablated.config, seed=3, positions=300)
    (other,) = random_points([1], [1, 2, 3], ablated.config, seed=4, positions=300)
    assert torch.equal(again.force, points[0].force)  # type: ignore[arg-type]
    assert not torch.equal(other.force, points[0].force)  # type: ignore[arg-type]


def test_draws_with_adapters_skip_as_many_and_nothing_else(
    llm: FlexiDepth, windows: list[list[int]]
) -> None:
    nothing, one, other = (
        *random_adapter_points([0, 1], 3, seed=3),
        *random_adapter_points([1], 3, seed=4),
    )
    base = trace_windows(llm.engine, all_counted(windows), base_point())
    found = [trace_windows(llm.engine, all_counted(windows), p) for p in (nothing, one, other)]
    assert nothing.same_as_base and torch.equal(found[0].logprobs, base.logprobs)
    assert [trace.skipped for trace in found] == [0, 1, 1]
    assert not torch.equal(found[1].logprobs, found[2].logprobs)
    assert one.arguments()["routing_seed"] == 3
    answer = llm.generate("the cat", max_new_tokens=4, return_routing=True, **one.arguments())
    assert answer.routing is not None and answer.routing.layers_used == [3] * len(
        answer.routing.tokens
    )


@pytest.mark.parametrize("most", [0, 1, 2, 4])
def test_layers_are_chosen_one_after_the_other(most: int) -> None:
    """Alone 0 is the cheapest and 1 the next; but without 0 the layer 1 is dear."""
    looked: list[list[int]] = []

    def loss(skipped: Sequence[int]) -> float:
        looked.append(list(skipped))
        alone = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.9}
        return 5 + sum(alone[n] for n in skipped) + (1.0 if {0, 1} <= set(skipped) else 0.0)

    assert greedy_order(loss, range(4), most) == [0, 2, 3, 1][:most]
    # What was dearer alone than the cheapest is now is not looked at again.
    assert [0, 3] not in looked


def test_static_layers_are_those_that_text_misses_least(
    llm: FlexiDepth, windows: list[list[int]]
) -> None:
    text = all_counted(windows)

    def loss(skipped: Sequence[int]) -> float:
        kept = [layer for layer in (1, 2, 3) if layer not in skipped]
        return -float(trace_windows(llm.engine, text, Point("x", 0, kept)).logprobs.mean())

    alone = {layer: loss([layer]) for layer in (1, 2, 3)}
    assert len(set(alone.values())) == 3
    assert skipping_order(llm.engine, text, 1) == [min(alone, key=lambda layer: alone[layer])]
    assert skipping_order(llm.engine, text, 3) == greedy_order(loss, (1, 2, 3), 3)


@torch.no_grad()
def test_block_influence_is_one_minus_the_mean_cosine(
    checkpoint: Checkpoint, windows: list[list[int]]
) -> None:
    found = block_influence(checkpoint, windows[1:])
    model = base_model_of(checkpoint.config, checkpoint.tensors())
    sums = torch.zeros(4, dtype=torch.float64)
    for window in windows[1:]:
        states = model(torch.tensor([window]), output_hidden_states=True).hidden_states
        # The last of them is behind the final norm: leave the last layer out.
        for layer in range(3):
            a, b = states[layer][0].double(), states[layer + 1][0].double()
            sums[layer] += ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum()
    assert found[:3] == pytest.approx((1 - sums / 140)[:3].tolist(), rel=1e-4)
    assert 0 < found[3] < 2


def test_a_layer_that_adds_nothing_has_no_influence(
    checkpoint: Checkpoint, windows: list[list[int]]
) -> None:
    import dataclasses

    def tensors():  # type: ignore[no-untyped-def]
        for name, tensor in checkpoint.tensors():
            silent = "layers.2." in name and name.endswith(("o_proj.weight", "down_proj.weight"))
            yield name, torch.zeros_like(tensor) if silent else tensor

    quiet = dataclasses.replace(checkpoint, read_tensors=tensors)
    found = block_influence(quiet, windows[1:])
    assert found[2] == pytest.approx(0, abs=1e-6)
    assert min(found[0], found[1], found[3]) > 0.01
