"""Each ablation against its formula, for every token at once and by hand."""

from __future__ import annotations

import pytest
import torch

from flexidepth import FlexiDepth
from flexidepth.checkpoints import open_checkpoint, save_routing
from flexidepth.config import ABLATIONS
from flexidepth.errors import UnsupportedError, ValueOutOfRangeError
from flexidepth.modeling import FlexiDepthForCausalLM

from ..engine.conftest import tiny_config, tiny_model


@pytest.fixture
def ids(ids):
    return ids[:1]


def seen(run, ablations):
    """bool [1, tokens, tokens]: keys that are there, of tokens that begin with the sequence's first."""
    own = torch.eye(run.shape[1], dtype=torch.bool)[None]
    first = (torch.arange(run.shape[1]) == 0)[None, None]
    if "no_skipped_kv" in ablations:
        return run[:, None, :] | own
    if "no_skipped_kv_but_first" in ablations:
        return run[:, None, :] | own | first
    return own | ~own


def by_hand(layer, h, step, run, w, ablations):
    """The layer's output with everything computed and masks multiplied in."""
    x = layer.input_layernorm(h)
    keys, values = layer.self_attn.keys_values(x, step)
    step.mask = step.mask & seen(run, ablations)
    taken = run.float()[..., None]
    attended = layer.self_attn(x, keys, values, step)
    if "attention_only" in ablations:
        h1 = h + taken * w[..., None] * attended
        return h1 + layer.mlp(layer.post_attention_layernorm(h1))
    h1 = h + (attended if "feed_forward_only" in ablations else taken * attended)
    y = layer.post_attention_layernorm(h1)
    out = h1 + taken * w[..., None] * layer.mlp(y)
    if "no_adapter" not in ablations:
        out = out + (1 - taken) * (1 - w)[..., None] * layer.adapter(y)
    return out


def captured_layer(model, ids, index=2):
    seen = {}
    layer = model.model.layers[index]
    hook = layer.register_forward_hook(lambda _, i, o: seen.update(i=i, o=o))
    model(ids, use_cache=False)
    hook.remove()
    return layer, seen["i"], seen["o"]


@torch.no_grad()
@pytest.mark.parametrize("names", [[name] for name in ABLATIONS] + [list(ABLATIONS[:4])])
def test_forward_is_the_formula(ids, names):
    model = tiny_model(tiny_config(ablations=names, router_bias=True))
    layer, (h, step, *_), (out, gates, run) = captured_layer(model, ids)
    assert 0 < run.float().mean() < 1
    torch.testing.assert_close(out, by_hand(layer, h, step, run, gates, names))
    if "linear_router" in names:
        x = layer.input_layernorm(h)
        head = layer.router.head
        torch.testing.assert_close(gates, torch.sigmoid(x @ head.weight[0] + head.bias))
    assert hasattr(layer, "adapter") == (not {"no_adapter", "attention_only"} & set(names))


@torch.no_grad()
@pytest.mark.parametrize("name", ABLATIONS)
def test_every_layer_run_is_the_base_model(ids, name):
    model = tiny_model(tiny_config(ablations=[name]))
    whole = tiny_model(tiny_config())
    want = whole(ids, force_routing="dense", use_cache=False).logits
    model.load_state_dict(whole.state_dict(), strict=False)
    got = model(ids, force_routing="all", use_cache=False).logits
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ABLATIONS)
def test_straight_through_slope_is_the_difference_of_the_paths(ids, name):
    model = tiny_model(tiny_config(ablations=[name], gate="straight_through", router_bias=True))
    model.train()
    layer, (h, step, threshold, decision), _ = captured_layer(model, ids, index=3)
    out, gates, run = layer(h.detach(), step, threshold, decision)
    direction = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * direction).sum(), gates)
    one, unit = torch.ones_like(gates), torch.ones_like(run)
    step.mask = step.mask & seen(run, [name])  # the others' keys stay as they are
    plain = [other for other in [name] if not other.startswith("no_skipped_kv")]
    with torch.no_grad():
        full = by_hand(layer, h, step, unit, one, plain)
        short = by_hand(layer, h, step, ~unit, 0 * one, plain)
    torch.testing.assert_close(got, ((full - short) * direction).sum(-1), rtol=1e-4, atol=1e-4)
    # Where gates learn only where they skip, running tokens have no slope, and their other path is not computed.
    x = layer.input_layernorm(h)
    rows: list[int] = []
    layer.mlp.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    slope = layer._difference(
        h, x, *layer.self_attn.keys_values(x, step), step, run, out.detach(), False
    )
    torch.testing.assert_close(slope, (full - short) * ~run[..., None], rtol=1e-4, atol=1e-4)
    assert sum(rows) == int((~run).sum()) < run.numel()


def test_skipped_keys_are_forgotten_and_a_cache_is_refused(ids):
    model = tiny_model(tiny_config(ablations=["no_skipped_kv"], routing_layers=[2]))
    with torch.no_grad():
        run = torch.ones(40, 1, dtype=torch.bool)
        run[:20] = False
        changed = ids.clone()
        changed[0, :19] = 7
        first = model(ids, force_routing=run, use_cache=False).logits[0, -1]
        whole = tiny_model(tiny_config(routing_layers=[2]))
        assert not torch.equal(first, whole(ids, force_routing=run, use_cache=False).logits[0, -1])
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        model(ids, use_cache=True)


@torch.no_grad()
def test_the_first_token_that_is_kept_is_that_of_a_tokens_own_text(ids):
    """Two packed texts: each sees its own first token, skipped or not, and of other skipped tokens none."""
    model = tiny_model(
        tiny_config(ablations=["no_skipped_kv_but_first"], routing_layers=[2], sliding_window=None)
    )
    layer, (_, step, *_), (_, _, run) = captured_layer(model, ids)
    texts = torch.arange(40) // 20
    mask = (texts[:, None] == texts) & torch.ones(40, 40, dtype=torch.bool).tril()
    step.mask = mask[None]
    nothing = torch.zeros_like(run)
    got = layer._seen(step, nothing).mask[0]
    want = torch.eye(40, dtype=torch.bool)
    want[:20, 0] = True
    want[20:, 20] = True
    assert torch.equal(got, want)


def test_checkpoints_hold_what_is_there_and_the_engine_refuses(tmp_path):
    names = ["linear_router", "no_adapter"]
    model = tiny_model(tiny_config(ablations=names))
    model.save_pretrained(tmp_path / "whole")
    checkpoint = open_checkpoint(tmp_path / "whole")
    assert checkpoint.config.ablations == names
    stored = dict(checkpoint.tensors())
    assert not any(".adapter." in n or "router.enc" in n for n in stored)
    again = FlexiDepthForCausalLM.from_pretrained(tmp_path / "whole")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(UnsupportedError, match="linear_router, no_adapter"):
        FlexiDepth.from_pretrained(tmp_path / "whole", num_threads=1)
    saved = save_routing(model, tmp_path / "routing", base_model=tmp_path / "whole")
    assert open_checkpoint(saved).config.ablations == names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["linear_routers"], "did you mean 'linear_router'"),
        (["attention_only", "feed_forward_only"], "exclude each other"),
        (["no_skipped_kv_but_first", "no_skipped_kv"], "exclude each other"),
    ],
)
def test_what_is_refused(names, message):
    with pytest.raises(ValueOutOfRangeError, match=message):
        tiny_config(ablations=names)
