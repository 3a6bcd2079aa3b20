"""The phases of a routed layer of a few rows: what they join has the bits of the ops that each compute a part."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from flexidepth import reference
from flexidepth_ext.cuda_ops import CudaOps, Decisions, PagedCache, RouterWeights
from flexidepth_ext.errors import DtypeError, ShapeError, ValueOutOfRangeError

from ..engine.conftest import tiny_config, tiny_model
from ..tolerances import assert_as_exact_as_torch
from .conftest import DTYPES

D, CODE, HEADS, KV = 48, 12, 2, 1
EPS = 1e-5
LINE = 128
KINDS = ["router", "run", "skip", "mixed"]


class Layer:
    """Weights and rows of a routed layer. Widths are odd, blocks of every part are left over at its end."""

    def __init__(self, dtype, rows, head_dim=16, *, adapter=27, width=41, biases=False, seed=0):
        torch.manual_seed(seed)
        self.rows, self.head_dim, self.dtype = rows, head_dim, dtype
        self.h = torch.randn(rows, D)
        self.norm, self.second_norm = (torch.rand(D) + 0.5 for _ in range(2))
        self.enc = torch.randn(CODE, D) / 8
        self.dec, self.head = torch.randn(D, CODE), torch.randn(1, D) / 4
        self.router = RouterWeights(
            torch.rand(CODE) + 0.5, folded=reference.fold_router(self.dec, self.head), bias=0.1
        )

        def matrix(n, k):
            return (torch.randn(n, k) / 8).to(dtype), torch.randn(n) if biases else None

        self.q, self.k, self.v = (matrix(n * head_dim, D) for n in (HEADS, KV, KV))
        self.gate, self.up, self.adapter_down = (
            matrix(adapter, D),
            matrix(adapter, D),
            matrix(D, adapter),
        )
        self.down = matrix(D, width)
        self.activation = torch.randn(rows, width)
        self.positions = torch.randperm(400)[:rows]
        self.sequences = torch.randint(0, 2, (rows,), dtype=torch.int32)
        self.inv_freq = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)

    def cache(self, ops):
        return PagedCache(ops, self.dtype, 2, KV, self.head_dim, 400, 2, device=ops.device_type)

    def forced(self, kind):
        """A mask, None where the router decides."""
        mask = torch.full((self.rows,), int(kind == "run"), dtype=torch.uint8)
        if kind == "mixed":
            mask[::2] = 1
        return None if kind == "router" else mask

    def entry(self, ops, encoded, cache, table, **options):
        return ops.routed_entry(
            self.h,
            encoded,
            self.router,
            norm=self.norm,
            q=self.q,
            k=self.k,
            v=self.v,
            table=table,
            cache=cache,
            positions=self.positions,
            sequences=self.sequences,
            adapter_norm=self.second_norm,
            gate=self.gate,
            up=self.up,
            eps=EPS,
            layer=1,
            **options,
        )

    def fused(self, ops, **options):
        """(codes, queries, cache, activation, decisions, h behind the layer's last phase)."""
        encoded = ops.router_code(self.h, self.enc, self.norm, EPS)
        cache, table = self.cache(ops), ops.rope_table(self.positions, self.inv_freq)
        before = self.h.clone()
        q, activation, decisions = self.entry(ops, encoded, cache, table, **options)
        assert torch.equal(self.h, before)  # other blocks read it still
        h = ops.routed_exit(
            self.h.clone(),
            decisions,
            feed_forward=(self.activation, self.down),
            adapter=(activation, self.adapter_down),
        )
        return encoded, q, cache, activation, decisions, h

    def separate(self, ops, **options):
        """The first phases' results, but for the adapter's, by an op for each."""
        table, cache = ops.rope_table(self.positions, self.inv_freq), self.cache(ops)
        encoded = ops.project(self.h, self.norm, EPS, table=table, first=self.enc)
        gates = ops.router_gate(encoded.clone(), self.router)
        decisions = ops.compact(gates, options.pop("threshold", 0.5), **options)
        ops.project(
            self.h,
            self.norm,
            EPS,
            table=table,
            k=self.k[0],
            k_bias=self.k[1],
            v=self.v[0],
            v_bias=self.v[1],
            cache=cache,
            layer=1,
            positions=self.positions,
            sequences=self.sequences,
        )
        run, _ = decisions.counts.tolist()
        q = torch.zeros(self.rows, len(self.q[0]))
        if run:
            index = decisions.run_index[:run].contiguous()
            q[:run] = ops.project(
                self.h,
                self.norm,
                EPS,
                table=table,
                first=self.q[0],
                first_bias=self.q[1],
                rotate_first=True,
                index=index,
            )
        return encoded, q, cache, decisions

    def separate_exit(self, ops, decisions, activation):
        """h behind an op for each half; adapters that have biases here begin with `activation`."""
        run, skip = decisions.counts.tolist()
        index = {"run": decisions.run_index[:run], "skip": decisions.skip_index[:skip]}
        scale = {"run": decisions.run_scale[:run], "skip": decisions.skip_scale[:skip]}
        h = self.h.clone()

        def add(way, given, down):
            x = torch.zeros(self.rows, given.shape[1])
            x[index[way].long()] = given[: len(index[way])]
            ops.linear(x, *down, index=index[way], out=h, scale=scale[way])

        if run:
            add("run", self.activation, self.down)
        if skip and self.gate[1] is not None:
            add("skip", activation, self.adapter_down)
        elif skip:
            weights = self.gate[0], self.up[0], self.adapter_down[0]
            norm = self.second_norm
            ops.adapter(
                h, h, *weights, index=index["skip"], scale=scale["skip"], norm=norm, eps=EPS
            )
        return h


def assert_same_decisions(got: Decisions, want: Decisions) -> tuple[int, int]:
    run, skip = want.counts.tolist()
    assert got.counts.tolist() == [run, skip]
    assert torch.equal(got.gates, want.gates) and torch.equal(got.ran, want.ran)
    for name, count in (("run", run), ("skip", skip)):
        for what in ("index", "scale"):
            field = f"{name}_{what}"
            assert torch.equal(getattr(got, field)[:count], getattr(want, field)[:count])
    return run, skip


def assert_same(layer: Layer, ops: CudaOps, **options) -> tuple[int, int]:
    encoded, q, cache, activation, decisions, h = layer.fused(ops, **options)
    want_encoded, want_q, want_cache, want_decisions = layer.separate(ops, **options)
    assert torch.equal(encoded, want_encoded)
    run, skip = assert_same_decisions(decisions, want_decisions)
    assert torch.equal(q, want_q)
    assert torch.equal(cache.pages, want_cache.pages) and want_cache.pages.any()
    assert not activation[skip:].any() and (activation[:skip] != 0).all()
    assert torch.equal(h, layer.separate_exit(ops, want_decisions, activation))
    return run, skip


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_phases_have_the_bits_of_separate_ones(ops, dtype, rows):
    layer = Layer(dtype, rows, seed=rows)
    for kind in KINDS:
        for unit_scales in (False, True):
            run, skip = assert_same(layer, ops, forced=layer.forced(kind), unit_scales=unit_scales)
            assert run + skip == rows
            assert (run, skip) == {
                "run": (rows, 0),
                "skip": (0, rows),
                "mixed": (rows - rows // 2, rows // 2),
            }.get(kind, (run, skip))


def test_the_router_sends_rows_both_ways(ops):
    """Or the test above would see decisions of one kind alone."""
    found = [assert_same(Layer(torch.bfloat16, 8, seed=seed), ops) for seed in range(3)]
    assert any(run and skip for run, skip in found)
    layer = Layer(torch.bfloat16, 8)
    assert assert_same(layer, ops, threshold=0.0) == (8, 0)
    assert assert_same(layer, ops, threshold=1.0) == (0, 8)


def test_results_go_where_they_are_asked_to(ops):
    """And what is behind the rows that are there stays."""
    layer, rows = Layer(torch.bfloat16, 5), 5
    forced = layer.forced("mixed")
    encoded = ops.router_code(layer.h, layer.enc, layer.norm, EPS)
    table = ops.rope_table(layer.positions, layer.inv_freq)
    q, activation, _ = layer.entry(ops, encoded, layer.cache(ops), table, forced=forced)
    out = torch.full_like(q, 7.0), torch.full_like(activation, 7.0)
    *got, decisions = layer.entry(ops, encoded, layer.cache(ops), table, forced=forced, out=out)
    run, skip = decisions.counts.tolist()
    assert run and skip and all(one is other for one, other in zip(got, out, strict=True))
    for one, wanted, count in zip(out, (q, activation), (run, skip), strict=True):
        assert torch.equal(one[:count], wanted[:count]) and (one[count:] == 7).all()
    for few, message in (
        ((out[0][:4], out[1]), rf"queries is \[4, {q.shape[1]}\]; wanted \[{rows}, {q.shape[1]}\]"),
        ((out[0], out[1][:, 1:]), r"activation is .*; wanted \[rows, "),
    ):
        with pytest.raises(ShapeError, match=message):
            layer.entry(ops, encoded, layer.cache(ops), table, out=few)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [False, True])
def test_sizes_of_heads_and_biases(ops, dtype, head_dim, biases):
    layer = Layer(dtype, 3, head_dim, biases=biases)
    assert_same(layer, ops, forced=layer.forced("mixed"))


@pytest.mark.parametrize(("adapter", "width"), [(1, 8), (64, 33), (8200, 16), (16, 2100)])
def test_halves_of_different_widths(ops, adapter, width):
    """Of one more, of the other fewer inputs than are in shared memory at a time."""
    layer = Layer(torch.bfloat16, 2, adapter=adapter, width=width)
    assert_same(layer, ops, forced=layer.forced("mixed"))


@pytest.mark.parametrize("order", ["norm_tanh", "tanh_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_against_the_reference(ops, dtype, rows, order):
    layer = Layer(dtype, rows, biases=True, seed=3)
    layer.router = RouterWeights(
        layer.router.norm, folded=layer.router.folded, bias=0.1, order=order
    )
    forced = layer.forced("mixed")
    encoded, q, _, activation, decisions, h = layer.fused(ops, forced=forced)
    run, skip = ((forced == way).nonzero()[:, 0] for way in (1, 0))

    def maths(kind):
        def of(weight):
            return weight[0].to(kind), weight[1].to(kind)

        x, y = (
            reference.rms_norm(layer.h.to(kind), n.to(kind), EPS)
            for n in (layer.norm, layer.second_norm)
        )
        gates = reference.router_gate(
            reference.rms_norm(layer.h.double(), layer.norm.double(), EPS),
            *(t.double() for t in (layer.enc, layer.router.norm, layer.dec, layer.head)),
            torch.tensor(0.1),
            eps=1e-5,
            order=order,
        )
        cos, sin = (
            t[:, None] for t in reference.rope_cos_sin(layer.positions, layer.inv_freq, kind)
        )
        queries = F.linear(x, *of(layer.q)).view(rows, HEADS, -1)
        queries = reference.apply_rope(queries, cos, sin).flatten(1)[run]
        inner = (F.silu(F.linear(y, *of(layer.gate))) * F.linear(y, *of(layer.up)))[skip]
        run_scale, skip_scale = reference.gate_scales(gates.to(kind), forced.bool(), unit=False)
        out = layer.h.to(kind)
        given = layer.activation[: len(run)].to(kind)
        out[run] = out[run] + run_scale[run, None] * F.linear(given, *of(layer.down))
        out[skip] = out[skip] + skip_scale[skip, None] * F.linear(inner, *of(layer.adapter_down))
        return gates, queries, inner, out

    gates, *exact = maths(torch.float64)
    code = F.linear(
        reference.rms_norm(layer.h.double(), layer.norm.double(), EPS), layer.enc.double()
    )
    assert_as_exact_as_torch(
        encoded, F.linear(reference.rms_norm(layer.h, layer.norm, EPS), layer.enc), code
    )
    torch.testing.assert_close(decisions.gates.double(), gates, rtol=1e-5, atol=1e-6)
    ours = q[: len(run)], activation[: len(skip)], h
    for got, want, same_type in zip(ours, exact, maths(dtype)[1:], strict=True):
        if want.numel():
            assert_as_exact_as_torch(got, same_type, want)


def lines_of(tensor, nbytes=None):
    """Addresses of the 128-byte lines that hold a tensor's first bytes."""
    count = tensor.nbytes if nbytes is None else min(nbytes, tensor.nbytes)
    return {tensor.data_ptr() + at for at in range(0, count, LINE)}


def test_what_is_brought_closer(emulated: ModuleType):
    """The router's own matrix, and all that was asked for, once each and not a line more."""
    ops, rows = CudaOps(emulated, "cpu"), 2
    layer = Layer(torch.bfloat16, rows)
    own = layer.enc.data_ptr(), layer.enc.data_ptr() + layer.enc.nbytes
    ahead = [torch.zeros(n, dtype=torch.uint8) for n in (1, 300_000, 131_072, 128, 129)]

    def found(pieces):
        addresses = emulated.prefetches_of(
            lambda: ops.router_code(layer.h, layer.enc, layer.norm, EPS, ahead=pieces)
        )
        mine = [a for a in addresses if own[0] <= a < own[1]]
        assert set(mine) == set().union(*(lines_of(row) for row in layer.enc))
        return [a for a in addresses if not own[0] <= a < own[1]]

    for pieces in (ahead, ahead[:2], []):
        asked = found(pieces)
        wanted = set().union(*(lines_of(piece) for piece in pieces))
        assert len(asked) == len(wanted) and set(asked) == wanted


@pytest.mark.parametrize("runs", [0, 1])
@pytest.mark.parametrize("kb", [0, 1, 1000])
def test_what_an_engine_brings_closer(make, emulated, monkeypatch, ids, kb, runs):
    """Keys' and values' weights always, of the way that is taken all (their rows are short), and of the one that is not
    as much as was asked for before that was known."""
    model = tiny_model(tiny_config())
    monkeypatch.setenv("FLEXIDEPTH_CUDA_PREFETCH_KB", str(kb))
    engine = make(model)
    cache = engine.new_cache(4)
    mask = torch.full((1, 3), runs, dtype=torch.uint8)
    addresses = set(
        emulated.prefetches_of(
            lambda: engine.forward(ids[:1].contiguous(), [1], [cache], routing="forced", mask=mask)
        )
    )
    all_of_it = 1 << 30
    to_run, to_skip = (all_of_it, 0) if runs else (0, all_of_it)
    for layer in (1, 2, 3):
        for name, nbytes in (
            ("self_attn.k_proj", all_of_it),
            ("self_attn.v_proj", all_of_it),
            ("self_attn.q_proj", max(to_run, kb * 1024 // 2)),
            ("self_attn.o_proj", to_run),
            ("mlp.gate_proj", to_run),
            ("mlp.up_proj", to_run),
            ("mlp.down_proj", to_run),
            ("adapter.gate_proj", max(to_skip, kb * 1024 // 4)),
            ("adapter.up_proj", max(to_skip, kb * 1024 // 4)),
            ("adapter.down_proj", to_skip),
        ):
            weight = engine.weights[f"model.layers.{layer}.{name}.weight"]
            wanted = (
                set().union(*(lines_of(row) for row in weight))
                if nbytes == all_of_it
                else (lines_of(weight, nbytes))
            )
            own = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            got = {address for address in addresses if own[0] <= address < own[1]}
            if nbytes == all_of_it:
                assert wanted <= got, (name, layer)
            else:
                assert got == wanted, (name, layer)


@pytest.mark.parametrize("value", ["-1", "much", "1.5"])
def test_an_amount_to_prefetch_that_is_none(make, monkeypatch, value):
    monkeypatch.setenv("FLEXIDEPTH_CUDA_PREFETCH_KB", value)
    with pytest.raises(ValueOutOfRangeError, match=r"KiB to prefetch .*wanted a whole number"):
        make(tiny_model(tiny_config()))


def test_what_cannot_be_joined(ops):
    layer = Layer(torch.bfloat16, 9)
    with pytest.raises(ValueOutOfRangeError, match="router_code: 9 rows; wanted at most 8"):
        ops.router_code(layer.h, layer.enc, layer.norm, EPS)
    layer = Layer(torch.bfloat16, 2)
    with pytest.raises(DtypeError, match=r"enc has dtype torch\.bfloat16; wanted float32"):
        ops.router_code(layer.h, layer.enc.bfloat16(), layer.norm, EPS)
    with pytest.raises(ShapeError, match="6 tensors ahead; wanted at most 5"):
        ops.router_code(layer.h, layer.enc, layer.norm, EPS, ahead=[layer.enc] * 6)
    cache, table = layer.cache(ops), ops.rope_table(layer.positions, layer.inv_freq)

    def entry(encoded=None, **changes):
        changed = Layer(torch.bfloat16, 2)
        for name, value in changes.items():
            setattr(changed, name, value)
        codes = torch.zeros(2, CODE) if encoded is None else encoded
        return changed.entry(ops, codes, cache, table)

    strict = RouterWeights(torch.ones(CODE), dec=torch.ones(D, CODE), head=torch.ones(D))
    with pytest.raises(ValueOutOfRangeError, match="a strict router; wanted one that has folded"):
        entry(router=strict)
    with pytest.raises(DtypeError, match=r"matrices of torch.float32, torch.bfloat16.*one type"):
        entry(q=(layer.q[0].float(), None))
    with pytest.raises(ShapeError, match=r"up \[26, 48\]; wanted \[w, d\] both"):
        entry(up=(layer.up[0][:26], None))
    with pytest.raises(ShapeError, match=r"wanted \[n, 48\]"):
        entry(q=(layer.q[0][:, :40].contiguous(), None))
    with pytest.raises(ShapeError, match="codes of 3 rows; there are 2"):
        entry(torch.zeros(3, CODE))
    *_, decisions, _ = layer.fused(ops)
    with pytest.raises(ShapeError, match=r"an activation \[1, 41\] .*wanted \[rows, w\]"):
        ops.routed_exit(
            layer.h,
            decisions,
            feed_forward=(layer.activation[:1], layer.down),
            adapter=(torch.zeros(2, 27), layer.adapter_down),
        )
    with pytest.raises(DtypeError, match=r"torch\.bfloat16, torch\.float32; wanted one type"):
        ops.routed_exit(
            layer.h,
            decisions,
            feed_forward=(layer.activation, layer.down),
            adapter=(torch.zeros(2, 27), layer.adapter_down[0].float()),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_part_have_the_bits_of_each_alone(make, ids, dtype):
    """In every layer some rows run and some skip, so both ways' results are in use at the same time."""
    rows = 5
    engine = make(tiny_model(tiny_config()), dtype)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.uint8)

    def caches():
        made = [engine.new_cache(16) for _ in range(rows)]
        for i, cache in enumerate(made):
            engine.forward(ids[: i + 1].contiguous(), [i + 1], [cache])
        return made

    tokens = ids[10 : 10 + rows].contiguous()
    together = engine.forward(tokens, [1] * rows, caches(), routing="forced", mask=mask)
    for i, cache in enumerate(caches()):
        one = slice(i, i + 1)
        alone = engine.forward(
            tokens[one].clone(), [1], [cache], routing="forced", mask=mask[one].clone()
        )
        assert torch.equal(together.logits[one], alone.logits)
        assert torch.equal(together.gates[one], alone.gates)
