"""Speed counts only with the same answers: logits and gates against a float32 reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexidepth.base_model import base_model_of
from flexidepth.checkpoints import Checkpoint
from flexidepth.modeling import FlexiDepthForCausalLM
from flexidepth.routing import ForcedRouting

from .plans import Plan

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


def text_ids(checkpoint: Checkpoint) -> list[int]:
    """Ids of a fixed text of 256 tokens; of the first 256 of the vocabulary where there is no tokenizer."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        return list(range(_TOKENS))
    ids: list[int] = tokenizer(_TEXT * 8)["input_ids"][:_TOKENS]
    return ids


class Reference:
    """What the float32 model makes of a fixed text, for engines to be compared with."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.ids = checkpoint, torch.tensor(text_ids(checkpoint))
        self.config = checkpoint.config
        model = FlexiDepthForCausalLM(self.config).eval()
        model.load_state_dict(dict(checkpoint.tensors()), strict=False)
        model.tie_weights()
        self.model = model

    @torch.inference_mode()
    def compare(self, engine: Any, plan: Plan) -> tuple[float, float | None]:
        """(RMSE of the engine's logits on the plan's decisions, share of its gates' decisions that are the
        reference's; None where no gate is computed)."""
        if plan.asked is None:
            want = self.model(self.ids[None], force_routing="dense").logits[0].double()
            return _rmse(_logits(engine, self.ids, "dense", None)[0], want), None
        thresholds = torch.tensor(self.config.router_thresholds)
        if plan.thresholds is not None:
            thresholds = plan.thresholds
        forced = None
        if plan.mask is not None:
            mask = plan.mask(0, 0, len(self.ids))
            forced = ForcedRouting(plan.mode, engine.num_routed, plan.name, recorded=mask)
        kept = self.config.router_thresholds
        self.model.config.router_thresholds = thresholds.tolist()
        try:
            want = self.model(self.ids[None], force_routing=forced)
        finally:
            self.model.config.router_thresholds = kept
        # On the same decisions: where a gate falls the other way the logits say nothing about arithmetic.
        mode = "forced" if forced is None else plan.mode
        logits, gates = _logits(engine, self.ids, mode, want.run[0].to(torch.uint8))
        equal = (gates > thresholds) == (want.gates[0] > thresholds)
        share = float(equal.float().mean()) if equal.numel() else None
        return _rmse(logits, want.logits[0].double()), share

    @torch.inference_mode()
    def summary(self, engine: Any) -> Accuracy:
        """The model's own decisions, and the dense model beside torch's own in the engine's type."""
        batch = self.ids[None]
        base = base_model_of(self.config, self.checkpoint.tensors()).float()
        exact_dense = base(batch).logits[0].double()
        torch_dense = base.to(engine.dtype)(batch).logits[0].double()
        del base
        want = self.model(batch)
        ours_dense = _logits(engine, self.ids, "dense", None)[0]
        replayed, gates = _logits(engine, self.ids, "forced", want.run[0].to(torch.uint8))
        thresholds = torch.tensor(self.config.router_thresholds)
        equal = (gates > thresholds) == want.run[0]
        settled = (want.gates[0] - thresholds).abs() > _MARGIN
        return Accuracy(
            tokens=len(self.ids),
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
    engine: Any, ids: torch.Tensor, routing: Any, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    cache = engine.new_cache(len(ids))
    logits, gates = [], []
    for start in range(0, len(ids), engine.max_rows):
        tokens = ids[start : start + engine.max_rows].to(torch.int32)
        rows = torch.arange(len(tokens), dtype=torch.int32)
        own = None if mask is None else mask[start : start + len(tokens)].contiguous()
        step = engine.forward(
            tokens, [len(tokens)], [cache], routing=routing, mask=own, logits_rows=rows
        )
        logits.append(step.logits.double().cpu())
        gates.append(step.gates.clone().cpu())
    cache.release()
    return torch.cat(logits), torch.cat(gates)


def _rmse(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).square().mean().sqrt())
