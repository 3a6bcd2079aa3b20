"""The trainable model behind the engine's interface: batches of unlike sequences, caches, greedy answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexidepth import FlexiDepth, open_checkpoint
from flexidepth.errors import UnsupportedError
from flexidepth.evaluation.answers import answer_prompts
from flexidepth.evaluation.points import Point, base_point
from flexidepth.evaluation.torch_engine import TorchEngine
from flexidepth.evaluation.windows import trace_windows

from .conftest import all_counted, save_tiny

PROMPTS = [[{"role": "user", "content": text}] for text in ("the cat", "a mat at noon", "sat")]
ROUTERS = Point("m", 1, thresholds=[0.4, 0.6, 0.5])


def test_the_trainable_model_answers_as_the_engine_does(llm: FlexiDepth, model: Path) -> None:
    engine = TorchEngine(open_checkpoint(model), torch.float32)
    windows = all_counted([list(range(40, 90)), list(range(7, 27))])
    mask = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    for point in (base_point(), Point("m", 1, thresholds=[0.4, 0.6, 0.5]), Point("m", 1, mask)):
        ours = trace_windows(engine, windows, point)
        want = trace_windows(llm.engine, windows, point)
        torch.testing.assert_close(ours.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)
        assert ours.skipped == want.skipped and torch.equal(ours.best, want.best)
    cache = engine.new_cache(9)
    ids = torch.arange(4, dtype=torch.int32)
    engine.forward(ids, [4], [cache])
    with pytest.raises(
        UnsupportedError, match=r"a routing mask for 1 sequences, \[4\] tokens held"
    ):
        engine.forward(ids, [4], [cache], routing="forced", mask=mask[:4].to(torch.uint8))


@pytest.mark.parametrize("point", [base_point(), ROUTERS])
def test_its_greedy_answers_are_the_engines(llm: FlexiDepth, model: Path, point: Point) -> None:
    checkpoint = open_checkpoint(model)
    engine = TorchEngine(checkpoint, torch.float32)
    with FlexiDepth(
        engine,  # type: ignore[arg-type]
        checkpoint.config,
        checkpoint.tokenizer(),
        routers_trained=True,
        source="tiny",
    ) as other:
        found, want = (answer_prompts(own, PROMPTS, point, 20) for own in (other, llm))
        assert found == want
        with pytest.raises(UnsupportedError, match=r"temperature 0\.7 of an ablated model"):
            other.generate("the", temperature=0.7, max_new_tokens=2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "ablation", ["no_adapter", "no_skipped_kv", "no_skipped_kv_but_first", "attention_only"]
)
def test_tokens_behind_a_cache_are_those_of_a_whole_pass(
    tmp_path: Path, ablation: str, window: int | None
) -> None:
    """Unlike lengths, in three calls of unlike counts; one sequence goes on from a copy of another's cache."""
    changes = {"gate": "straight_through", "sliding_window": window}
    engine = TorchEngine(
        open_checkpoint(save_tiny(tmp_path / "tiny", ablations=[ablation], **changes)),
        torch.float32,
    )
    thresholds = torch.tensor([0.5, 0.5, 0.5])
    ids = torch.randint(3, 250, (3, 30), generator=torch.Generator().manual_seed(1))
    ids[2, :9] = ids[1, :9]
    lengths = [(2, 1, 4), (9, 1, 7)]
    caches = [engine.new_cache(30) for _ in range(3)]

    def forward(parts: list[Tensor], which: list[int]) -> list[Tensor]:
        counts = [len(part) for part in parts]
        flat = torch.cat(parts).int()
        every = torch.arange(len(flat))
        step = engine.forward(
            flat, counts, [caches[i] for i in which], thresholds=thresholds, logits_rows=every
        )
        assert 0 < step.ran.sum() < step.ran.numel()
        return list(step.logits.split(counts))

    got: list[list[Tensor]] = [[], [], []]
    begin = [0, 0]
    for counts in zip(*lengths, strict=True):
        parts = [ids[b, begin[b] : begin[b] + n] for b, n in enumerate(counts)]
        for b, logits in enumerate(forward(parts, [0, 1])):
            got[b].append(logits)
            begin[b] += counts[b]
        if begin[1] == 9:
            caches[2].copy_from(caches[1])
    got[2] += [got[1][0], *forward([ids[2, 9:12]], [2])]
    caches[1].truncate(12)
    assert [cache.length for cache in caches] == [7, 12, 12]
    for b, parts in enumerate(got):
        length = sum(map(len, parts))
        with torch.no_grad():
            engine.model.config.router_thresholds = thresholds.tolist()
            want = engine.model(ids[b : b + 1, :length], use_cache=False).logits[0]
        torch.testing.assert_close(torch.cat(parts), want, rtol=1e-4, atol=1e-4)


def test_tokens_that_ran_every_layer_are_seen_by_those_that_do_not(tmp_path: Path) -> None:
    """The routing may change between calls; what one call kept is what the next one sees."""
    folder = save_tiny(tmp_path / "tiny", ablations=["no_skipped_kv"], gate="straight_through")
    engine = TorchEngine(open_checkpoint(folder), torch.float32)
    ids = torch.arange(40, 52, dtype=torch.int32)
    mask = torch.ones(12, 3, dtype=torch.uint8)
    mask[8:] = 0
    whole = engine.forward(
        ids, [12], [engine.new_cache(12)], routing="forced_hard", mask=mask, logits_rows=ids - 40
    )
    cache, every = engine.new_cache(12), torch.ones(3)
    engine.forward(ids[:8], [8], [cache], routing="dense")
    step = engine.forward(ids[8:], [4], [cache], thresholds=every, logits_rows=ids[:4] - 40)
    torch.testing.assert_close(step.logits, whole.logits[8:], rtol=1e-4, atol=1e-4)
    assert not step.ran.any() and cache.nbytes == 4 * 2 * 12 * 4 * engine.config.head_dim * 2
    cache.release()
    assert (cache.length, cache.nbytes) == (0, 0)
