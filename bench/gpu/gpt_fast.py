"""gpt-fast (github.com/meta-pytorch/gpt-fast) as a peer: its model.py out of a checkout, at a model's shape.

Its decoding step is compiled as its generate.py compiles it: one graph, reduce-overhead, coordinate descent over the
kernels' parameters. Nothing of it is here or is downloaded: whoever wants the comparison names a checkout. Both
interfaces that the model has had are known: a mask of its own, and later one of flex attention that is passed to it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flexidepth.config import FlexiDepthConfig

_MODULE = "gpt_fast_model"
_COMPILER = {"coordinate_descent_tuning": True, "triton.unique_kernel_names": True}


class GptFast:
    """A model with random weights that decodes one token a step, greedily, behind a context of zeros.

    Raises what a checkout that is none, or is not understood, leads to.
    """

    def __init__(
        self,
        checkout: Path,
        config: FlexiDepthConfig,
        dtype: torch.dtype,
        device: torch.device,
        context: int,
        more: int,
    ) -> None:
        module = load_model_file(checkout)
        arguments = module.ModelArgs(**model_arguments(config))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self.model = module.Transformer(arguments).eval()
        finally:
            torch.set_default_dtype(before)
        with torch.device(device):
            self.model.setup_caches(max_batch_size=1, max_seq_length=context + more)
            self.token = torch.full((1, 1), 5, dtype=torch.int32)
            self.position = torch.tensor([context], dtype=torch.int32)
        self.masks = _Masks(self.model, device)
        self._decode: Callable[..., Any] = torch.compile(
            _decode_one_token, mode="reduce-overhead", fullgraph=True
        )

    @torch.no_grad()
    def step(self) -> None:
        """One token; the first ones compile."""
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        with self.masks.attention(), torch._inductor.config.patch(_COMPILER):
            chosen = self._decode(self.model, self.token, self.position, self.masks.whole)
        self.token.copy_(chosen)
        self.position.add_(1)


def load_model_file(checkout: Path) -> ModuleType:
    """model.py of a checkout, under a name of its own."""
    path = checkout / "model.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; wanted: a checkout of gpt-fast")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    missing = [name for name in ("ModelArgs", "Transformer") if not hasattr(module, name)]
    if missing:
        raise AttributeError(f"{path} has no {missing[0]}; wanted: a checkout of gpt-fast")
    return module


def model_arguments(config: FlexiDepthConfig) -> dict[str, Any]:
    """A model's sizes in gpt-fast's words."""
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"gpt-fast has no head_dim of its own: {config.num_attention_heads} heads of {config.head_dim} are not "
            f"hidden_size {config.hidden_size}"
        )
    return {
        "block_size": int(config.max_position_embeddings),
        "vocab_size": int(config.vocab_size),
        "n_layer": int(config.num_hidden_layers),
        "n_head": int(config.num_attention_heads),
        "dim": int(config.hidden_size),
        "intermediate_size": int(config.intermediate_size),
        "n_local_heads": int(config.num_key_value_heads),
        "norm_eps": float(config.rms_norm_eps),
    }


class _Masks:
    """whole: the flex attention mask of all positions, for a model that is passed one; else None."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.whole: Any = None
        if "mask" in inspect.signature(type(model).forward).parameters:
            from torch.nn.attention.flex_attention import create_block_mask

            length = model.max_seq_length
            self.whole = create_block_mask(_causal, 1, 1, length, length, device=device)

    def attention(self) -> AbstractContextManager[Any]:
        """Without flex attention gpt-fast leaves attention to the compiler, not to a library's kernel."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return nullcontext() if self.whole is not None else sdpa_kernel(SDPBackend.MATH)


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _decode_one_token(model: Any, token: Tensor, position: Tensor, masks: Any) -> Tensor:
    if masks is None:
        logits = model(token, position)
    else:
        mask = masks[:, :, position // masks.BLOCK_SIZE[0]]
        mask.mask_mod, mask.seq_lengths = masks.mask_mod, (1, model.max_seq_length)
        logits = model(mask, token, position)
    chosen: Tensor = logits[:, -1].argmax(-1, keepdim=True).to(token.dtype)
    return chosen
