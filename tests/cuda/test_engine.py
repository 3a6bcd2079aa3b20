"""The CUDA engine against the reference, on the emulated kernels: tiny models, every way to route."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext import cuda_engine, cuda_prompt
from flexidepth_ext.cuda_engine import CudaEngine
from flexidepth_ext.errors import (
    EngineBusyError,
    EngineClosedError,
    ShapeError,
    UnsupportedError,
    ValueOutOfRangeError,
)

from ..engine.conftest import VOCAB, tiny_config, tiny_model, weights_of
from ..engine.test_against_reference import MARGIN, VARIANTS, compare

VARIANTS_HERE = {**VARIANTS, "odd_sizes": {**VARIANTS["odd_sizes"], "head_dim": 24}}

CASES = [*((name, False) for name in VARIANTS_HERE), ("plain", True), ("router_bias", True)]


@pytest.mark.parametrize(("name", "strict"), CASES)
def test_a_prompt(make, ids, name, strict):
    model = tiny_model(tiny_config(**VARIANTS_HERE[name]))
    compare(model, make(model, strict_router=strict), ids)


@pytest.mark.parametrize(("name", "strict"), CASES)
def test_token_by_token(make, ids, name, strict):
    """Decoding: gates recomputed by every block, queries of the running rows."""
    model = tiny_model(tiny_config(**VARIANTS_HERE[name]))
    engine, ids = make(model, strict_router=strict), ids[:14]
    logits, gates, ran = everything(engine, ids, step=1)
    with torch.no_grad():
        want = model(ids[None].long())
    torch.testing.assert_close(logits, want.logits[0], rtol=2e-5, atol=2e-5)
    if model.config.num_routed_layers:
        torch.testing.assert_close(gates, want.gates[0], rtol=1e-5, atol=MARGIN / 2)
        assert torch.equal(ran.bool(), want.run[0])


def test_forced_routing(make, ids):
    model = tiny_model(tiny_config())
    engine, ids = make(model), ids[:12]
    ones, zeros = torch.ones(12, 3, dtype=torch.uint8), torch.zeros(12, 3, dtype=torch.uint8)
    compare(model, engine, ids, "all", routing="forced_hard", mask=ones)
    compare(model, engine, ids, "none", routing="forced_hard", mask=zeros)
    compare(model, engine, ids, "dense", routing="dense")
    recorded = torch.randint(0, 2, (12, 3), dtype=torch.uint8)
    compare(model, engine, ids, recorded, routing="forced", mask=recorded)
    logits, _, ran = everything(engine, ids, step=1, routing="forced", mask=recorded)
    with torch.no_grad():
        want = model(ids[None].long(), force_routing=recorded)
    torch.testing.assert_close(logits, want.logits[0], rtol=2e-5, atol=2e-5)
    assert torch.equal(ran, recorded)
    dense, gates, ran = everything(engine, ids, step=1, routing="dense")
    assert gates.isnan().all() and ran.all()
    with torch.no_grad():
        want = model(ids[None].long(), force_routing="dense")
    torch.testing.assert_close(dense, want.logits[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("step", [1, 40])
def test_half_precision_replays_the_reference(make, ids, dtype, step):
    """On the same decisions at most twice the error of torch in the same type."""
    model = tiny_model(tiny_config(hidden_size=96, intermediate_size=224, head_dim=32))
    with torch.no_grad():
        want = model(ids[None].long())
        exact = tiny_model(model.config).double()(ids[None].long(), force_routing=want.run[0])
        torchs = tiny_model(model.config).to(dtype)(ids[None].long(), force_routing=want.run[0])
    mask = want.run[0].to(torch.uint8)
    logits, gates, _ = everything(make(model, dtype), ids, step, routing="forced", mask=mask)
    ours = (logits.double() - exact.logits[0]).square().mean().sqrt()
    theirs = (torchs.logits[0].double() - exact.logits[0]).square().mean().sqrt()
    assert 0 < ours <= 2 * theirs
    settled = (want.gates[0] - 0.5).abs() > 0.02
    assert torch.equal((gates > 0.5)[settled], want.run[0][settled])


TORCH_VARIANTS = ["plain", "straight_through", "router_bias", "untied", "all_biases", "mistral"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TORCH_VARIANTS)
@pytest.mark.parametrize("strict", [False, True])
def test_a_prompt_that_torch_multiplies(make, ids, dtype, name, strict):
    """Rows gathered for what they run, with the errors of torch in the same type, on the same decisions."""
    changes = {"hidden_size": 96, "intermediate_size": 224, "head_dim": 32}
    model = tiny_model(tiny_config(**VARIANTS[name] | changes))
    with torch.no_grad():
        want = model(ids[None].long())
        exact = tiny_model(model.config).double()(ids[None].long(), force_routing=want.run[0])
        torchs = tiny_model(model.config).to(dtype)(ids[None].long(), force_routing=want.run[0])
    engine = make(model, dtype, strict_router=strict)
    engine.own_rows = 8
    mask = want.run[0].to(torch.uint8)
    logits, gates, ran = everything(engine, ids, routing="forced", mask=mask)
    assert torch.equal(ran, mask)
    ours = (logits.double() - exact.logits[0]).square().mean().sqrt()
    theirs = (torchs.logits[0].double() - exact.logits[0]).square().mean().sqrt()
    assert 0 < ours <= 2 * theirs
    settled = (want.gates[0] - torch.tensor(model.config.router_thresholds)).abs() > 0.02
    assert torch.equal((gates > 0.5)[settled], want.run[0][settled])
    *_, decided = everything(engine, ids)
    assert torch.equal(decided.bool()[settled], want.run[0][settled])


def rounds_to_tf32():
    """Whether torch rounds to TF32. Of two switches, the older cannot be read while the newer says otherwise."""
    settings = torch.backends.cuda.matmul
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision == "tf32"
    return settings.allow_tf32


@pytest.mark.parametrize("allowed", [True, False])
def test_gates_of_a_prompt_are_not_rounded_to_tf32(make, ids, monkeypatch, allowed):
    """The caller's setting is there again afterwards, also behind an error."""
    settings, seen = torch.backends.cuda.matmul, []
    linear = cuda_prompt.F.linear

    def spy(x, weight):
        if weight.shape[0] == config.router_dim:
            seen.append(rounds_to_tf32())
        return linear(x, weight)

    config = tiny_config()
    engine = make(tiny_model(config), torch.bfloat16)
    engine.own_rows = 8
    monkeypatch.setattr(cuda_prompt.F, "linear", spy)
    before = settings.allow_tf32
    settings.allow_tf32 = allowed
    try:
        everything(engine, ids, step=len(ids))
        assert seen == [False] * config.num_routed_layers
        assert settings.allow_tf32 is allowed
        with pytest.raises(RuntimeError), cuda_prompt.whole_float32():
            raise RuntimeError
        assert settings.allow_tf32 is allowed
    finally:
        settings.allow_tf32 = before


def test_torch_multiplies_what_our_kernels_do(make, ids):
    """Every way to route, sequences side by side, a cache that goes on: as with our own products."""
    model = tiny_model(tiny_config(hidden_size=96, intermediate_size=224, head_dim=32))
    engines = make(model, torch.float16), make(model, torch.float16)
    engines[1].own_rows = 8
    mask = torch.randint(0, 2, (40, 3), dtype=torch.uint8)
    ways = (
        {"routing": "dense"},
        {"routing": "forced_hard", "mask": torch.zeros_like(mask)},
        {"routing": "forced_hard", "mask": torch.ones_like(mask)},
        {"routing": "forced", "mask": mask},
    )
    for way in ways:
        (logits, gates, ran), (own, own_gates, own_ran) = (
            everything(engine, ids, **way) for engine in reversed(engines)
        )
        torch.testing.assert_close(logits, own, rtol=2e-2, atol=3e-2)
        torch.testing.assert_close(gates, own_gates, rtol=1e-2, atol=1e-2, equal_nan=True)
        assert torch.equal(ran, own_ran)
    *_, ran = everything(engines[1], ids, thresholds=torch.tensor([0.0, 1.0, 0.0]))
    assert ran.float().mean(0).tolist() == [1, 0, 1]
    results = []
    for engine in engines:
        caches = [engine.new_cache(64) for _ in range(2)]
        engine.forward(ids[:5].contiguous(), [5], caches[:1])
        results.append(engine.forward(ids[5:30].contiguous(), [12, 13], caches).logits)
        assert [cache.length for cache in caches] == [17, 13]
    torch.testing.assert_close(*results, rtol=2e-2, atol=3e-2)


def test_thresholds_of_a_call(make, ids):
    model = tiny_model(tiny_config())
    engine = make(model)
    for step in (1, 12):
        for tau, share in ((0.0, 1.0), (1.0, 0.0)):
            *_, ran = everything(engine, ids[:12], step, thresholds=torch.full((3,), tau))
            assert ran.float().mean() == share


def test_sequences_side_by_side_have_the_bits_of_each_alone(make, ids):
    """Three sequences of different lengths decode together, each routed for itself."""
    model = tiny_model(tiny_config())
    engine = make(model)
    starts = [ids[:9], ids[9:12], ids[12:30]]
    next_ids = torch.tensor([5, 6, 7], dtype=torch.int32)

    def prefilled():
        caches = [engine.new_cache(64) for _ in starts]
        for cache, start in zip(caches, starts, strict=True):
            engine.forward(start.contiguous(), [len(start)], [cache])
            cache.poison_unused()
        return caches

    together = engine.forward(next_ids, [1, 1, 1], prefilled())
    for i, cache in enumerate(prefilled()):
        alone = engine.forward(next_ids[i : i + 1], [1], [cache])
        assert torch.equal(alone.logits[0], together.logits[i])
        assert torch.equal(alone.ran[0], together.ran[i])
    # A prompt of several sequences at once.
    caches = [engine.new_cache(64) for _ in starts]
    whole = engine.forward(torch.cat(starts), [len(s) for s in starts], caches)
    for i, (start, cache) in enumerate(zip(starts, caches, strict=True)):
        alone = engine.forward(start.contiguous(), [len(start)], [engine.new_cache(64)])
        assert torch.equal(alone.logits[0], whole.logits[i])
        assert cache.length == len(start)


def test_a_cache_grows_over_pages_and_shrinks(make, ids):
    model = tiny_model(tiny_config())
    engine = make(model)
    text = ids.repeat(7)[:270]
    cache = engine.new_cache(300)
    for start in range(0, 256, 64):
        engine.forward(text[start : start + 64].contiguous(), [64], [cache])
    assert cache.num_pages == 1
    first = engine.forward(text[256:258].contiguous(), [2], [cache])
    assert cache.num_pages == 2 and cache.nbytes == 2 * engine.native.page_bytes
    copy = engine.new_cache(300)
    copy.copy_from(cache)
    cache.truncate(256)
    assert cache.num_pages == 1
    again = engine.forward(text[256:258].contiguous(), [2], [cache])
    assert torch.equal(first.logits, again.logits)
    token = text[258:259].contiguous()
    assert torch.equal(
        engine.forward(token, [1], [cache]).logits, engine.forward(token, [1], [copy]).logits
    )
    with pytest.raises(ValueOutOfRangeError, match="301 tokens do not fit max_length 300"):
        engine.forward(text[:42].contiguous(), [42], [copy])
    assert copy.length == 259
    cache.release()
    assert cache.length == cache.nbytes == 0


def test_a_draw_is_the_cpu_engines(make):
    from flexidepth_ext.engine import Engine

    model = tiny_model(tiny_config())
    engine = make(model)
    host = Engine(model.config, weights_of(model), dtype=torch.float32)
    logits = 3 * torch.randn(4, VOCAB)
    places = {"seeds": torch.tensor([1, 2, 3, -4]), "positions": torch.tensor([9, 8, 7, 6])}
    for settings in ((0.0, 0, 1.0, 0.0), (0.8, 0, 1.0, 0.0), (1.0, 7, 0.9, 0.01)):
        names = ("temperature", "top_k", "top_p", "min_p")
        arguments = dict(zip(names, settings, strict=True))
        ours, theirs = (e.sample(logits, **arguments, **places) for e in (engine, host))
        assert torch.equal(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])
    with pytest.raises(ValueOutOfRangeError, match="row 1 of the logits has a NaN"):
        logits[1, 3] = torch.nan
        engine.sample(logits, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, **places)
    host.close()


def test_what_it_refuses(make, ids):
    model = tiny_model(tiny_config())
    engine = make(model)
    cache = engine.new_cache(100)

    def forward(tokens=ids[:4], counts=(4,), caches=(cache,), **more):
        engine.forward(tokens.contiguous(), list(counts), list(caches), **more)

    for match, error, call in (
        ("65 rows in one pass; 1 to 64", ValueOutOfRangeError, {"tokens": ids.repeat(2)[:65]}),
        ("token id 211 at row 2", ValueOutOfRangeError, {"tokens": ids[:4].index_fill(0, torch.tensor(2), 211)}),
        ("counts add up to 3", ShapeError, {"counts": (3,)}),
        ("1 counts for 2 caches", ShapeError, {"caches": (cache, cache)}),
        ("listed twice", ValueOutOfRangeError, {"counts": (2, 2), "caches": (cache, cache)}),
        ("belongs to another model", ShapeError, {"caches": (make(model).new_cache(10),)}),
        ("needs a mask", ValueOutOfRangeError, {"routing": "forced"}),
        (r"logits rows \[4\] asked of 4 rows", ValueOutOfRangeError, {"logits_rows": ids.new_tensor([4])}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            forward(**call)
    assert cache.length == 0
    forward()
    with engine.exclusive("a test"), pytest.raises(EngineBusyError):
        forward()
    engine.close()
    with pytest.raises(EngineClosedError, match="forward after close"):
        forward()
    with pytest.raises(EngineClosedError, match="new_cache after close"):
        engine.new_cache(3)
    engine.close()


def test_weights_that_do_not_fit(make):
    model = tiny_model(tiny_config())
    given = dict(weights_of(model))
    runtime = make(model).runtime

    def load(config=model.config, **changes):
        merged = {**given, **changes}
        tensors = [(n, t) for n, t in merged.items() if t is not None]
        CudaEngine(config, tensors, dtype=torch.float32, runtime=runtime)

    enc, dec = "model.layers.1.router.enc.weight", "model.layers.1.router.dec.weight"
    for match, changes in (
        ("1 tensors missing: model.norm.weight", {"model.norm.weight": None}),
        ("tensors missing: .*router.dec.weight", {dec: None}),
        ("unexpected tensor x", {"x": torch.zeros(3)}),
        ("unexpected tensor model.layers.0.router.dec", {"model.layers.0.router.dec.weight": given[dec]}),
        (r"enc.weight is \[3, 48\]; wanted \[12, 48\]", {enc: torch.zeros(3, 48)}),
        ("NaN or infinite", {"model.norm.weight": torch.full((48,), torch.nan)}),
        ("head.bias came", {"model.layers.1.router.head.bias": torch.zeros(1)}),
    ):  # fmt: skip
        with pytest.raises((ValueOutOfRangeError, ShapeError), match=match):
            load(**changes)
    with pytest.raises(
        UnsupportedError, match="head_dim is 10; the CUDA kernels take multiples of 8"
    ):
        load(tiny_config(head_dim=10))


def test_an_engine_keeps_nothing_of_the_callers(make, ids):
    model = tiny_model(tiny_config())
    engine = make(model)
    before = everything(engine, ids[:6])[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(everything(engine, ids[:6])[0], before)


def everything(engine, ids, step=None, **routing):
    """Logits [T, vocab], gates and decisions, computed `step` tokens at a time."""
    cache = engine.new_cache(len(ids))
    parts = []
    for start in range(0, len(ids), step or len(ids)):
        piece = ids[start : start + (step or len(ids))].contiguous()
        own = dict(routing)
        if "mask" in own:
            own["mask"] = own["mask"][start : start + len(piece)].contiguous()
        rows = torch.arange(len(piece), dtype=torch.int32)
        result = engine.forward(piece, [len(piece)], [cache], logits_rows=rows, **own)
        parts.append((result.logits.clone(), result.gates, result.ran))
    cache.release()
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


@pytest.mark.parametrize("routing", ["router", "forced", "dense"])
def test_a_float32_prompt_is_cut_where_its_scratch_ends(make, ids, monkeypatch, routing):
    """Two sequences, the first over a page, in pieces of 8 rows: the bits of one piece, wherever logits are asked."""
    model = tiny_model(tiny_config())
    whole = make(model)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_engine, "_PROMPT_SCRATCH", 1)
        cut = make(model)
    assert (whole._prompt_scratch.rows, cut._prompt_scratch.rows) == (64, 8)
    asked = torch.tensor([20, 3, 8, 7, 20], dtype=torch.int32)
    forced = {"mask": torch.randint(0, 2, (21, 3), dtype=torch.uint8)}
    results, steps = [], []
    for engine in (whole, cut):
        caches = [engine.new_cache(300) for _ in range(2)]
        caches[0].extend_with_zeros(250)
        own = forced if routing == "forced" else {}
        results.append(
            engine.forward(ids[:21], [10, 11], caches, routing=routing, logits_rows=asked, **own)
        )
        assert [cache.length for cache in caches] == [260, 11]
        steps.append(engine.forward(ids[21:23].contiguous(), [1, 1], caches))
    for one, other in (results, steps):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.ran, other.ran)
        assert torch.equal(one.gates.nan_to_num(7), other.gates.nan_to_num(7))


def test_the_scratch_of_prompts_has_a_bound(make, monkeypatch):
    """A float32 prompt's attention keeps partial results of each row and page, and a million tokens are many pages."""
    bound = 40 << 20
    monkeypatch.setattr(cuda_engine, "_PROMPT_SCRATCH", bound)
    config = tiny_config(max_position_embeddings=1 << 20)
    long = make(tiny_model(config), max_rows=1000)._prompt_scratch
    needed = 1000 * 6 * 4096 * 18 * 4  # rows, heads, pages, floats
    assert long.memory.nbytes <= bound < needed / 10
    assert long.rows % 8 == 0 and long.rows > 8
    short = make(tiny_model(config), max_rows=1000, max_length=256)._prompt_scratch
    assert short.rows == 1000
    half = make(tiny_model(config), torch.bfloat16, max_rows=1000)._prompt_scratch
    assert half.rows == 64 and half.memory.nbytes < bound / 10
