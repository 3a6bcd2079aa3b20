"""Tokenizers for training sets; a tiny base model and its data, for whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexidepth.checkpoints import open_checkpoint
from flexidepth.errors import DownloadError
from flexidepth.training.packing import collate
from flexidepth.training.run import TrainingData
from tests.api.tokenizers import byte_tokenizer

from .runs import Sequences

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<s>system\nBe brief.</s>\n' }}{% endif %}"
    "{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """One token a byte, and a template that adds a system prompt, as SmolLM2's does."""
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The tokenizer of the default model."""
    try:
        return open_checkpoint("smollm2-135m").tokenizer()
    except DownloadError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("base") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def data() -> TrainingData:
    def batch(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate(items, document_ids=True)

    return TrainingData(Sequences(64, 1), Sequences(4, 2), batch)
