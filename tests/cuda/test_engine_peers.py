"""The peers of `gpu_check --engine` without a device: what they decode, how they are compiled, why one fails."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench.gpu import engine_peers, engine_run
from bench.gpu.engine_peers import COMPILED, GPT_FAST, GRAPH, Peer, PeerRow, time_peers
from bench.gpu.engine_report import EngineReport, engine_lines
from bench.gpu.gpt_fast import GptFast
from bench.models import model_config

from .runtime import FakeRuntime

CPU = torch.device("cpu")
# What gpt-fast's model.py offers, as far as it is used. The token after one at position p is p, so that a test sees
# where the peer believes to be; {mask} is the argument that newer versions take first.
MODEL_FILE = """
from dataclasses import dataclass
from torch import Tensor, nn
import torch

@dataclass
class ModelArgs:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    dim: int
    intermediate_size: int
    n_local_heads: int
    norm_eps: float

class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def setup_caches(self, max_batch_size, max_seq_length):
        self.max_seq_length = max_seq_length
        self.register_buffer("seen", torch.zeros(max_batch_size, max_seq_length))

    def forward(self, {mask}idx, input_pos):
        assert idx.shape == (1, 1) and input_pos.shape == (1,)
        assert {mask_is}
        self.seen[:, input_pos] += 1
        return torch.nn.functional.one_hot(input_pos.long()[None], self.config.vocab_size).float()
"""
INTERFACES = {
    "own mask": MODEL_FILE.format(mask="", mask_is="True"),
    "flex attention": MODEL_FILE.format(
        mask="mask, ", mask_is="mask.seq_lengths == (1, self.max_seq_length)"
    ),
}


@pytest.fixture
def compiled(monkeypatch):
    """How torch.compile was called; it gives functions back as they are."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: calls.append(options) or f)
    return calls


@pytest.fixture(params=INTERFACES)
def checkout(request, tmp_path):
    (tmp_path / "model.py").write_text(INTERFACES[request.param])
    return tmp_path


def peers(**more):
    return list(time_peers(model_config("tiny"), torch.float32, CPU, 4, steps=2, **more))


def test_transformers_decodes_behind_the_context():
    """Against a cache of its own that has grown: zeros, and then the tokens."""
    from transformers import DynamicCache

    context, steps = 6, 4
    torch.manual_seed(0)
    peer = Peer(model_config("tiny"), torch.float32, CPU, context, steps)
    config, cache = peer.model.config, DynamicCache()
    for layer in range(config.num_hidden_layers):
        zeros = torch.zeros(1, config.num_key_value_heads, context, config.head_dim)
        cache.update(zeros, zeros, layer)
    token = torch.full((1, 1), 5)
    for step in range(steps):
        peer.step()
        keys = peer.cache.layers[0].keys.abs().sum((0, 1, 3)) > 0
        assert keys.nonzero().flatten().tolist() == list(range(context, context + step + 1))
        with torch.no_grad():
            logits = peer.model(token, past_key_values=cache).logits
        token = logits[:, -1:].argmax(-1)
        assert torch.equal(peer.token, token)
    assert peer.position.tolist() == [context + steps]


def test_every_way_has_room_for_what_it_decodes(monkeypatch, compiled, checkout):
    monkeypatch.setattr(engine_peers, "_in_a_graph", lambda peer: peer.step)
    rows = peers(gpt_fast=checkout)
    assert [row.name for row in rows] == [GRAPH, COMPILED, GPT_FAST]
    for row in rows:
        assert row.ms is not None and row.ms > 0, row.said
    assert compiled == [
        {"mode": "reduce-overhead"},
        {"mode": "reduce-overhead", "fullgraph": True},
    ]


def test_gpt_fast_decodes_behind_the_context(compiled, checkout):
    peer = GptFast(checkout, model_config("tiny"), torch.bfloat16, CPU, 6, 9)
    for position in (6, 7, 8):
        peer.step()
        assert int(peer.token) == position and int(peer.position) == position + 1
    assert peer.model.seen[0].tolist() == [0] * 6 + [1] * 3 + [0] * 6
    assert peer.model.output.weight.dtype == torch.bfloat16
    config = peer.model.config
    assert (config.n_head, config.n_local_heads, config.dim) == (4, 2, 64)
    assert (config.block_size, config.vocab_size, config.intermediate_size) == (1024, 256, 160)
    assert torch.get_default_dtype() == torch.float32


def test_gpt_fast_is_compiled_with_its_own_settings(monkeypatch, compiled, checkout):
    from torch._inductor import config

    peer = GptFast(checkout, model_config("tiny"), torch.float32, CPU, 6, 9)
    seen, decode = [], peer._decode
    peer._decode = lambda *given: (
        seen.append((config.coordinate_descent_tuning, config.triton.unique_kernel_names))
        or decode(*given)
    )
    before = config.coordinate_descent_tuning
    peer.step()
    assert seen == [(True, True)] and config.coordinate_descent_tuning == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "model.py is not there; wanted: a checkout of gpt-fast"),
        ("class ModelArgs: pass", "model.py has no Transformer; wanted: a checkout of gpt-fast"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_checkout_that_is_none_says_why(monkeypatch, compiled, tmp_path, text, said):
    monkeypatch.setattr(engine_peers, "_in_a_graph", lambda peer: peer.step)
    if text is not None:
        (tmp_path / "model.py").write_text(text)
    graph, _, gpt_fast = peers(gpt_fast=tmp_path)
    assert graph.ms is not None
    assert (gpt_fast.name, gpt_fast.ms) == (GPT_FAST, None) and said in gpt_fast.said
    report = EngineReport("tiny", False, 2, peers=[gpt_fast])
    assert said in "\n".join(engine_lines(report))


def test_heads_that_gpt_fast_cannot_have(compiled, checkout):
    config = model_config("tiny")
    config.head_dim = 24
    with pytest.raises(ValueError, match="4 heads of 24 are not hidden_size 64"):
        GptFast(checkout, config, torch.float32, CPU, 6, 9)


def test_peers_that_cannot_run_say_why(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(engine_peers, "_in_a_graph", lambda peer: peer.step)
    plain, compiled = peers()
    assert plain.name == GRAPH and plain.ms is not None and plain.ms > 0, plain.said
    assert (compiled.name, compiled.ms) == (COMPILED, None)
    assert compiled.said == "RuntimeError: no compiler"


def test_a_step_is_marked_and_warm_before_it_is_timed(monkeypatch, compiled):
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    peer = Peer(model_config("tiny"), torch.float32, CPU, 4, 20)
    step = engine_peers._compiled(peer)
    warm = len(marks)
    assert warm >= 3 and int(peer.position) == 4 + 1 + warm  # compiled, recorded, replayed
    step()
    assert len(marks) == warm + 1


def test_a_graph_is_captured_warm_on_its_own_stream(monkeypatch):
    """The order of what torch is asked for, on a device that is not there."""
    asked: list[str] = []

    class Stream:
        def wait_stream(self, other):
            asked.append("wait")

    class CUDAGraph:
        def replay(self):
            asked.append("replay")

    @contextmanager
    def within(name):
        asked.append(f"in {name}")
        yield
        asked.append(f"out of {name}")

    fakes = {
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "current_stream": Stream,
        "stream": lambda _: within("stream"),
        "graph": lambda _: within("graph"),
        "synchronize": lambda: asked.append("synchronize"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    class Steps:
        def step(self):
            asked.append("step")

    steps = Steps()
    held = weakref.ref(steps)
    replay = engine_peers._in_a_graph(steps)  # type: ignore[arg-type]
    del steps
    assert held() is not None  # the graph reads its weights
    replay()
    warm = asked[asked.index("in stream") + 1 : asked.index("out of stream")]
    assert warm == ["step"] * len(warm) and len(warm) >= 3
    assert asked[asked.index("out of stream") + 1 :] == [
        "synchronize", "in graph", "step", "out of graph", "replay",
    ]  # fmt: skip


def test_a_compiler_that_leaves_graphs_out_is_told(monkeypatch, compiled):
    from torch._dynamo.utils import counters

    def plain(peer):
        def step():
            counters["inductor"]["cudagraph_skips"] += 1
            peer.step()

        step()
        return step

    monkeypatch.setattr(engine_peers, "_in_a_graph", lambda peer: peer.step)
    monkeypatch.setattr(engine_peers, "_compiled", plain)
    graph, skipping = peers()
    assert (graph.said, skipping.said) == ("", "7 x without a CUDA graph")
    report = EngineReport("tiny", False, 2, peers=[skipping])
    assert f"| {COMPILED} (7 x without a CUDA graph) | " in "\n".join(engine_lines(report))


def test_the_checkout_comes_from_the_command(emulated, monkeypatch):
    given = []

    def time(config, dtype, device, context, *, gpt_fast):
        given.append(gpt_fast)
        return [PeerRow(GPT_FAST, context, 2.0)]

    monkeypatch.setattr(engine_run, "time_peers", time)
    monkeypatch.setattr(engine_run, "_time", lambda *_: None)
    reports: list[EngineReport] = []
    engine_run.run(
        ["tiny"], 1e9, True, lambda _: None, [], reports, lambda: None,
        gpt_fast=Path("there"), make_runtime=lambda: FakeRuntime(emulated), checked=[],
    )  # fmt: skip
    assert given == [Path("there")] and reports[0].peers[0].ms == 2.0
