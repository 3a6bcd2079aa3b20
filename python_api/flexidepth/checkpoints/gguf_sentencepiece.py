"""SentencePiece BPE out of GGUF metadata, the tokenizer of Llama 1, Llama 2 and early Mistral."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers

_SPACE = "▁"
# GGUF token types that merges lead to and from: normal, user-defined, unused
_MERGED = (1, 4, 5)


def sentencepiece(
    tokens: list[str], scores: list[float], kinds: list[int], unknown: str | None, *, prefix: bool
) -> Tokenizer:
    """The tokenizer, special tokens not yet added to it.

    Args:
        tokens, scores, kinds: by id; of two possible merges the one with the higher score is made first.
        unknown: token for a byte that has none of its own.
        prefix: put a space before a text, and behind each special token in it.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    merged = {
        token: i
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in _MERGED
    }
    merges = generate_merges(merged, {token: scores[i] for token, i in merged.items()})
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = [normalizers.Replace(" ", _SPACE)]
    # Not Metaspace, which adds no space to a text that starts with one, where llama.cpp does.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), *spaces] if prefix else spaces
    )
    text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)] if prefix else text)
    return tokenizer
