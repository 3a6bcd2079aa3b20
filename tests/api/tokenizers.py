"""Tokenizers made on the spot, one of each kind that models come with."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPECIAL = [AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")]


def byte_tokenizer(
    template: str | None = TEMPLATE, *, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level: one token a byte, plus <s> and </s>. adds_bos: <s> before every text, as Llama 3 does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: words with their space as \u2581, a token for each byte, no space in front."""
    words = [
        "",
        "\u2581",
        "\u2581\u2581",
        "\u2581hello",
        "\u2581the",
        "lo",
        "a",
        ".",
        "\u00e9",
        "\u65e5",
    ]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in (*(f"<0x{value:02X}>" for value in range(256)), *words):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As T5 and older exports: the \u2581 of the first token alone is dropped."""
    words = ["<unk>", "\u2581", "\u2581hello", "\u2581the", "lo", "a", ".", "\u65e5"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
