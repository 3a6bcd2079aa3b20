"""Tokenizers for training sets."""

from __future__ import annotations

from typing import Any

import pytest

from flexidepth.checkpoints import open_checkpoint
from flexidepth.errors import DownloadError
from tests.api.tokenizers import byte_tokenizer

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
