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
from .gguf_sentencepiece import sentencepiece

# GGUF token types that are matched whole, before the merges
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

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


def unknown_tokenizer(header: GgufHeader) -> str | None:
    """Why `gguf_tokenizer` cannot build the file's tokenizer; None if it can."""
    model, pre = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model == "llama" or (model == "gpt2" and pre in _PRE_TOKENIZERS):
        return None
    return (
        f"tokenizer {model!r} with pre-tokenizer {pre!r} is not implemented; SentencePiece ('llama') and "
        f"byte-level BPE ('gpt2') with {', '.join(_PRE_TOKENIZERS)} are"
    )


def gguf_tokenizer(header: GgufHeader) -> Any:
    """PreTrainedTokenizerFast with the file's vocabulary, special tokens and chat template.

    `encode` adds BOS and EOS as the file says; ids of a chat, whose template writes its own, are to be made
    with add_special_tokens=False.

    Raises:
        UnsupportedError: see `unknown_tokenizer`. CheckpointError: metadata missing or contradicting each other.
    """
    from transformers import PreTrainedTokenizerFast

    if reason := unknown_tokenizer(header):
        raise UnsupportedError(
            f"{header.path}: {reason}. Use the Hugging Face checkpoint of this model"
        )
    meta, tokens = header.metadata, _list(header, "tokens")
    tokenizer = _build(header, tokens)
    if processor := _post_processor(header, tokens):
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


def _post_processor(header: GgufHeader, tokens: list[str]) -> processors.TemplateProcessing | None:
    """What puts BOS before a text and EOS behind it, None where the file wants neither."""
    added: dict[str, str] = {}
    # What llama.cpp does where a file does not say.
    bos_default = _is_sentencepiece(header) or _pre(header) == "llama-bpe"
    for key, default in (("bos", bos_default), ("eos", False)):
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


def _is_sentencepiece(header: GgufHeader) -> bool:
    return bool(header.metadata["tokenizer.ggml.model"] == "llama")


def _pre(header: GgufHeader) -> str:
    return str(header.metadata.get("tokenizer.ggml.pre"))


def _build(header: GgufHeader, tokens: list[str]) -> Tokenizer:
    kinds = _list(header, "token_type")
    different = len(set(tokens))
    if len(kinds) != len(tokens) or different != len(tokens):
        raise CheckpointError(
            f"{header.path}: {len(tokens)} tokens, {different} of them different, {len(kinds)} token "
            "types; the three must agree"
        )
    if _is_sentencepiece(header):
        scores = _list(header, "scores")
        if len(scores) != len(tokens):
            raise CheckpointError(
                f"{header.path}: {len(tokens)} tokens, {len(scores)} scores; the two must agree"
            )
        prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
        unknown = _special(header, tokens, "unknown")
        tokenizer = sentencepiece(tokens, scores, kinds, unknown, prefix=prefix)
        special = [_UNKNOWN, _CONTROL]
    else:
        tokenizer = _byte_level(header, tokens, _pre(header))
        special = [_CONTROL]
    for wanted in (*special, _USER_DEFINED):
        texts = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
        tokenizer.add_tokens(
            [AddedToken(text, special=wanted in special, normalized=False) for text in texts]
        )
    return tokenizer


def _byte_level(header: GgufHeader, tokens: list[str], pre: str) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
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
