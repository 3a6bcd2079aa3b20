"""A tiny model behind FlexiDepth, with a byte-level tokenizer made on the spot."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import pre_tokenizers

from flexidepth.llm import FlexiDepth
from flexidepth_ext.engine import Engine

from ..engine.conftest import tiny_config, tiny_model, weights_of
from .tokenizers import byte_tokenizer

BOS, EOS = 256, 257
VOCAB = 258


@pytest.fixture(scope="session")
def model():
    config = tiny_config(vocab_size=VOCAB, eos_token_id=EOS, bos_token_id=BOS)
    return tiny_model(config)


@pytest.fixture
def llm(model) -> Iterator[FlexiDepth]:
    engine = Engine(model.config, weights_of(model), dtype=torch.float32, max_rows=32)
    with FlexiDepth(
        engine, model.config, byte_tokenizer(), routers_trained=True, source="test"
    ) as made:
        yield made


def script(llm: FlexiDepth, text: str | bytes, eos: bool = True) -> None:
    """Make the model say `text` whatever it is asked: logits are overridden, byte by byte."""
    data = text.encode() if isinstance(text, str) else text
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table = {}
    for value in range(256):
        try:
            table[value] = alphabet[encode.pre_tokenize_str(bytes([value]).decode())[0][0]]
        except UnicodeDecodeError:
            continue
    # Bytes above 127 cannot be pre-tokenised alone: take them from characters that contain them.
    for code in range(0x80, 0x800):
        for value, symbol in zip(
            chr(code).encode(), encode.pre_tokenize_str(chr(code))[0][0], strict=True
        ):
            table[value] = alphabet[symbol]
    for code in range(0x800, 0x110000, 0x3F):
        if 0xD800 <= code < 0xE000:
            continue
        for value, symbol in zip(
            chr(code).encode(), encode.pre_tokenize_str(chr(code))[0][0], strict=True
        ):
            table[value] = alphabet[symbol]
    tokens = [table[b] for b in data] + ([EOS] if eos else [])
    llm.engine.sample = _Scripted(tokens)


class _Scripted:
    """Stands in for engine.sample: returns the tokens of a script."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens, self.at = tokens, 0

    def __call__(self, logits: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
        token = self.tokens[min(self.at, len(self.tokens) - 1)]
        self.at += 1
        return torch.tensor([token], dtype=torch.int32), torch.zeros(1)
