"""The persistent kernel has the bits of the pass of many kernels: logits, gates, decisions and the cache."""

from __future__ import annotations

import pytest
import torch

from flexidepth_ext.errors import UnsupportedError

from ..engine.conftest import tiny_config, tiny_model
from ..engine.test_against_reference import VARIANTS
from .conftest import DTYPES, FORWARD, ON_DEVICE, REVERSE, SHUFFLED

ROOM = 600
CROSSING = [255, 3, 256]  # tokens before the first step: one sequence comes to its second page
VARIANTS_HERE = {
    **VARIANTS,
    "odd_sizes": {**VARIANTS["odd_sizes"], "head_dim": 24},
    "wide_window": {"base_model_type": "mistral", "sliding_window": 257},
    "wide_heads": {"head_dim": 72},  # sixteen lanes a token
    "one_key_head": {"num_key_value_heads": 1},  # six heads share it: two blocks
}


@pytest.fixture
def device(request):
    """How many blocks the emulated device holds, and in which order they and their threads take turns."""

    def choose(blocks=3, order=FORWARD, seed=0):
        if not ON_DEVICE:
            emulated = request.getfixturevalue("emulated")
            emulated.set_resident(blocks)
            emulated.set_order(order, seed)

    yield choose
    choose()


def filled(engine, starts):
    """Caches of so many tokens each, keys and values at random, the same for every engine."""
    generator = torch.Generator().manual_seed(5)
    caches = []
    for start in starts:
        cache = engine.new_cache(ROOM)
        cache.reserve(start + 4)
        cache.extend_with_zeros(start)
        with engine.runtime.active():  # behind the zeros that a new page begins with
            for page in cache.pages:
                values = torch.randn(page.nbytes // engine.dtype.itemsize, generator=generator)
                page.view(engine.dtype).copy_(values)
        caches.append(cache)
    return caches


def steps(engine, starts, count=2, **routing):
    """Logits, gates, decisions and all pages after `count` tokens of every sequence."""
    caches, made = filled(engine, starts), []
    masks = routing.pop("masks", None)
    for number in range(count):
        tokens = torch.tensor([17 * number + 5 * i + 1 for i in range(len(starts))])
        own = {} if masks is None else {"mask": masks[number]}
        step = engine.forward(tokens.int(), [1] * len(starts), caches, **routing, **own)
        made += [step.logits.clone(), step.gates.nan_to_num(7), step.ran]
    return [*made, *(page.cpu().clone() for cache in caches for page in cache.pages)]


def assert_same_bits(make, model, dtype, starts, **routing):
    """Both forms; returns what they gave."""
    forms = [make(model, dtype, persistent=persistent) for persistent in (False, True)]
    many, one = (steps(engine, starts, **routing) for engine in forms)
    for number, (ours, theirs) in enumerate(zip(one, many, strict=True)):
        assert torch.equal(ours, theirs), f"result {number}"
    return one


@pytest.mark.parametrize("name", VARIANTS_HERE)
def test_every_kind_of_model(make, device, name):
    device()
    model = tiny_model(tiny_config(**VARIANTS_HERE[name]))
    assert_same_bits(make, model, torch.bfloat16, CROSSING)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type(make, device, dtype):
    """And rows of which each takes its own way."""
    device()
    _, _, ran, *_ = assert_same_bits(make, tiny_model(tiny_config()), dtype, CROSSING)
    assert len({tuple(row) for row in ran.tolist()}) > 1
    assert 0 < ran.float().mean() < 1


@pytest.mark.parametrize("rows", range(1, 9))
def test_every_number_of_rows(make, device, rows):
    """Forced at random: layers that all rows run, that none runs, and others."""
    device()
    generator = torch.Generator().manual_seed(rows)
    masks = list(torch.randint(0, 2, (2, rows, 3), dtype=torch.uint8, generator=generator))
    masks[0][:, 0] = 1
    masks[1][:, 1] = 0
    starts = [20 * i + 1 for i in range(rows)]
    made = assert_same_bits(
        make, tiny_model(tiny_config()), torch.float16, starts, routing="forced", masks=masks
    )
    assert torch.equal(made[2], masks[0]) and torch.equal(made[5], masks[1])


@pytest.mark.parametrize("way", ["dense", "none", "all", "hard", "thresholds"])
def test_every_way_to_route(make, device, way):
    device()
    masks = {
        "none": torch.zeros(2, 2, 3, dtype=torch.uint8),
        "all": torch.ones(2, 2, 3, dtype=torch.uint8),
        "hard": torch.tensor([[[0, 1, 0], [1, 1, 0]], [[1, 0, 0], [0, 1, 1]]], dtype=torch.uint8),
    }
    routing = {
        "dense": {"routing": "dense"},
        "thresholds": {"thresholds": torch.tensor([0.0, 1.0, 0.5])},
    }.get(way) or {"routing": "forced_hard", "masks": list(masks[way])}
    assert_same_bits(make, tiny_model(tiny_config()), torch.bfloat16, [9, 256], **routing)


@pytest.mark.skipif(ON_DEVICE, reason="about the emulated device's blocks")
@pytest.mark.parametrize("order", [FORWARD, REVERSE, SHUFFLED])
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_any_number_of_blocks_in_any_order(make, device, blocks, order):
    """A grid's barrier left out, or a shared value read too early, shows here."""
    device(blocks, order, seed=11)
    model = tiny_model(tiny_config())
    assert_same_bits(make, model, torch.bfloat16, [256, 6])
    assert_same_bits(make, model, torch.bfloat16, [300], count=1)


def test_inputs_beyond_shared_memory(make, device):
    """Of eight rows 1024 inputs fit at a time, and a block takes several shares of a product."""
    device(2)
    model = tiny_model(tiny_config(intermediate_size=1100))
    assert_same_bits(make, model, torch.float32, [5, 6], count=1)


def test_logits_of_some_rows_and_of_none(make, device, ids):
    device()
    engine = make(tiny_model(tiny_config()), persistent=True)
    every = engine.forward(ids[:3].contiguous(), [1] * 3, filled(engine, [4, 5, 6]),
                           logits_rows=torch.arange(3, dtype=torch.int32))  # fmt: skip
    rows = torch.tensor([2, 0], dtype=torch.int32)
    for wanted in (rows, rows[:0]):
        some = engine.forward(
            ids[:3].contiguous(), [1] * 3, filled(engine, [4, 5, 6]), logits_rows=wanted
        )
        assert torch.equal(some.logits, every.logits[wanted.long()])
        assert torch.equal(some.gates, every.gates)


def test_prompts_go_their_own_way(make, device, ids):
    device()
    engines = [make(tiny_model(tiny_config()), persistent=form) for form in (False, True)]
    one, other = (e.forward(ids, [40], [e.new_cache(64)]).logits for e in engines)
    assert torch.equal(one, other)


def test_what_it_refuses(make, device):
    device()
    model = tiny_model(tiny_config())
    with pytest.raises(UnsupportedError, match="a persistent pass takes a folded router"):
        make(model, strict_router=True, persistent=True)
    engine = make(model, persistent=True)
    nothing, scratch = [0] * 4, engine.decode_scratch.arguments()

    def run(rows, prompt, native=engine.native):
        native.run(engine.runtime.stream, rows, prompt, *nothing, 1, 0, 0, 0, 0, rows, 0, 0, 0, *scratch,
                   0, False, False, True)  # fmt: skip

    with pytest.raises(UnsupportedError, match="a prompt; it takes one row a sequence"):
        run(2, True)
    with pytest.raises(UnsupportedError, match=r"9 rows .* it takes 1 to 8 rows"):
        scratch = (scratch[0], 9, scratch[2])
        run(9, False)
