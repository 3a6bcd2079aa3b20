"""Tokenizer out of GGUF metadata, built with the tokenizers library: the same ids as llama.cpp gives."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from ..errors import CheckpointError, UnsupportedError
from .gguf_header import GgufHeader

# GGUF token types that are matched whole, before the merges
_CONTROL, _USER_DEFINED = 3, 4

_SPLITS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_PRE_TOKENIZERS = ("smollm", *_SPLITS)


def gguf_tokenizer(header: GgufHeader) -> Any:
    """PreTrainedTokenizerFast with the file's vocabulary, special tokens and chat template.

    `encode` adds BOS and EOS as the file says; ids of a chat, whose template writes its own, are to be made
    with add_special_tokens=False.

    Raises:
        UnsupportedError: a tokenizer other than byte-level BPE with a known pre-tokenizer.
        CheckpointError: metadata missing or contradicting each other.
    """
    from transformers import PreTrainedTokenizerFast

    meta = header.metadata
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UnsupportedError(
            f"{header.path}: tokenizer {model!r} with pre-tokenizer {pre!r} is not implemented; byte-level "
            f"BPE ('gpt2') with {', '.join(_PRE_TOKENIZERS)} is. Use the Hugging Face checkpoint of this "
            "model"
        )
    tokens = _list(header, "tokens")

    tokenizer = _build(header, tokens, pre)
    if processor := _post_processor(header, tokens, pre):
        tokenizer.post_processor = processor
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_special(header, tokens, "bos"),
        eos_token=_special(header, tokens, "eos"),
        pad_token=_special(header, tokens, "padding"),
        unk_token=_special(header, tokens, "unknown"),
        clean_up_tokenization_spaces=False,
        model_max_length=meta.get(f"{meta.get('general.architecture')}.context_length", 1 << 30),
    )
    fast.chat_template = meta.get("tokenizer.chat_template")
    return fast


def _list(header: GgufHeader, key: str) -> list[Any]:
    value = header.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise CheckpointError(
            f"{header.path}: metadata tokenizer.ggml.{key} is {type(value).__name__}, not a list"
        )
    return value


def _special(header: GgufHeader, tokens: list[str], key: str) -> str | None:
    """The token the file names "bos", "eos", "padding" or "unknown"."""
    index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{header.path}: {key} token is {index}; the vocabulary has {len(tokens)} tokens"
        )
    return str(tokens[index])


def _post_processor(
    header: GgufHeader, tokens: list[str], pre: str
) -> processors.TemplateProcessing | None:
    """What puts BOS before a text and EOS behind it, None where the file wants neither."""
    added: dict[str, str] = {}
    # What llama.cpp does where a file does not say.
    for key, default in (("bos", pre == "llama-bpe"), ("eos", False)):
        flag, text = f"tokenizer.ggml.add_{key}_token", _special(header, tokens, key)
        if header.metadata.get(flag) and text is None:
            raise CheckpointError(
                f"{header.path}: {flag} is True, but tokenizer.ggml.{key}_token_id is missing; the two must "
                "agree"
            )
        if header.metadata.get(flag, default) and text is not None:
            added[key] = text
    if not added:
        return None
    # The list form: a template in one string could not hold a token with a space.
    bos, eos = ([added[key]] if key in added else [] for key in ("bos", "eos"))
    single = [f"{piece}:0" for piece in (*bos, "$A", *eos)]
    pair = single + [f"{piece}:1" for piece in (*bos, "$B", *eos)]
    ids = [(text, tokens.index(text)) for text in dict.fromkeys(added.values())]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _build(header: GgufHeader, tokens: list[str], pre: str) -> Tokenizer:
    kinds = _list(header, "token_type")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocabulary) != len(tokens):
        raise CheckpointError(
            f"{header.path}: {len(tokens)} tokens, {len(vocabulary)} of them different, {len(kinds)} token "
            "types; the three must agree"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in _list(header, "merges")]
    try:
        # Llama 3 takes a word that is a token as it is, whether or not the merges lead there.
        bpe = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    except (
        Exception
    ) as error:  # the library raises plain Exception for a merge outside the vocabulary
        raise CheckpointError(
            f"{header.path}: the tokenizer's merges do not fit its tokens: {error}"
        ) from error
    tokenizer = Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = (
            normalizers.NFC()
        )  # GGUF does not say so, but the model was trained with it
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    by_kind = {_CONTROL: tokenizer.add_special_tokens, _USER_DEFINED: tokenizer.add_tokens}
    for wanted, add in by_kind.items():
        special = wanted == _CONTROL
        texts = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        add([AddedToken(text, special=special, normalized=False) for text in texts])
    return tokenizer


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        # Without Digits, as transformers' own GGUF reader builds it, texts with numbers come out wrong.
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    split = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
