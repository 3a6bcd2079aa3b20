"""transformers, eager mode, on the base model in bfloat16."""

from __future__ import annotations

from typing import Any

import torch

from flexidepth.base_model import base_model_of

from ..timing import Case


def load(checkpoint: Any, dtype: torch.dtype) -> Any:
    """The base model as transformers' own class."""
    return base_model_of(checkpoint.config, checkpoint.tensors()).to(dtype).eval()


def decode_case(model: Any, context: int, threads: int) -> Case:
    """One token at a time with a dynamic cache, greedy."""
    from transformers import DynamicCache

    state: dict[str, Any] = {}

    @torch.inference_mode()
    def start() -> None:
        torch.set_num_threads(threads)
        state["cache"] = DynamicCache()
        ids = torch.full((1, context), 5)
        out = model(ids, past_key_values=state["cache"], use_cache=True, logits_to_keep=1)
        state["token"] = out.logits[:, -1].argmax(-1, keepdim=True)

    @torch.inference_mode()
    def step() -> None:
        out = model(state["token"], past_key_values=state["cache"], use_cache=True)
        state["token"] = out.logits[:, -1].argmax(-1, keepdim=True)

    return Case(_name(model), step, start)


def prompt_case(model: Any, tokens: int, threads: int) -> Case:
    """A whole prompt, logits of its last token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)

    @torch.inference_mode()
    def step() -> None:
        model(ids, use_cache=True, logits_to_keep=1)

    return Case(_name(model), step, lambda: torch.set_num_threads(threads))


def _name(model: Any) -> str:
    return "transformers eager " + str(model.dtype).removeprefix("torch.")
