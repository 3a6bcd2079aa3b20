"""Speed counts only with the same answers: logits and gates against a float32 reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexidepth.base_model import base_model_of
from flexidepth.checkpoints import Checkpoint
from flexidepth.modeling import FlexiDepthForCausalLM
from flexidepth_ext.engine import Engine

_TEXT = (
    "The Eiffel Tower was built for the World's Fair of 1889 and stood as the tallest structure in "
    "the world for forty-one years. "
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
)
_TOKENS = 256
_MARGIN = 0.01  # gates this close to the threshold may fall either way in bfloat16


@dataclass(frozen=True)
class Accuracy:
    """Against the reference in float32 with the weights as stored.

    logits_rmse: root mean square error of the engine's logits on the reference's decisions (replayed).
    torch_rmse: the same of transformers' own bfloat16 model against its float32 one, every layer run.
    engine_dense_rmse: of the engine on that same comparison. top1_agreement: share of tokens with the same
    first choice, every layer run. gate_max_error: largest gate difference. gate_agreement: share of
    decisions equal; gate_agreement_outside: of those whose gate is farther than `margin` from its threshold.
    """

    tokens: int
    margin: float
    logits_rmse: float
    engine_dense_rmse: float
    torch_rmse: float
    top1_agreement: float
    gate_max_error: float
    gate_agreement: float
    gate_agreement_outside: float
    decisions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@torch.inference_mode()
def measure_accuracy(checkpoint: Checkpoint, engine: Engine) -> Accuracy:
    """Compare the engine with the float32 reference on a fixed text."""
    tokenizer = checkpoint.tokenizer()
    ids = (
        tokenizer(_TEXT * 8)["input_ids"][:_TOKENS]
        if tokenizer is not None
        else list(range(_TOKENS))
    )
    batch = torch.tensor([ids])
    base = base_model_of(checkpoint.config, checkpoint.tensors())
    exact_dense = base(batch).logits[0].double()
    torch_dense = base.to(engine.dtype)(batch).logits[0].double()
    del base
    model = FlexiDepthForCausalLM(checkpoint.config).eval()
    model.load_state_dict(dict(checkpoint.tensors()), strict=False)
    model.tie_weights()
    want = model(batch)
    ours_dense = _logits(engine, batch[0], "dense", None)[0]
    replayed, gates = _logits(engine, batch[0], "forced", want.run[0].to(torch.uint8))
    thresholds = torch.tensor(checkpoint.config.router_thresholds)
    equal = (gates > thresholds) == want.run[0]
    settled = (want.gates[0] - thresholds).abs() > _MARGIN
    return Accuracy(
        tokens=len(ids),
        margin=_MARGIN,
        logits_rmse=_rmse(replayed, want.logits[0].double()),
        engine_dense_rmse=_rmse(ours_dense, exact_dense),
        torch_rmse=_rmse(torch_dense, exact_dense),
        top1_agreement=float((ours_dense.argmax(-1) == exact_dense.argmax(-1)).float().mean()),
        gate_max_error=float((gates - want.gates[0]).abs().max()),
        gate_agreement=float(equal.float().mean()),
        gate_agreement_outside=float(equal[settled].float().mean()),
        decisions=equal.numel(),
    )


def _logits(
    engine: Engine, ids: torch.Tensor, routing: Any, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = ids.to(torch.int32)
    rows = torch.arange(len(tokens), dtype=torch.int32)
    cache = engine.new_cache(len(tokens))
    step = engine.forward(
        tokens, [len(tokens)], [cache], routing=routing, mask=mask, logits_rows=rows
    )
    return step.logits.double(), step.gates


def _rmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().mean().sqrt())
