"""Which tokens a document becomes, and which of them are to be predicted."""

from __future__ import annotations

from typing import Any

import pytest

from flexidepth.errors import DataError, UnsupportedError, ValueOutOfRangeError
from flexidepth.training.documents import Document
from flexidepth.training.tokenization import check_tokenizer, tokenize, tokenizer_identity
from tests.api.tokenizers import byte_tokenizer

from .conftest import CHATML

CHAT = (
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Sure? It is 4."},
    {"role": "assistant", "content": "Ja, größer als 3 — sicher."},
)


def chat(*messages: dict[str, str]) -> Document:
    return Document("here", messages=messages)


def predicted_text(tokenizer: Any, document: Document, loss_on: str = "answers") -> list[str]:
    """The runs of predicted tokens as text."""
    ids, predicted = tokenize(document, tokenizer, loss_on)
    assert len(ids) == len(predicted)
    runs: list[list[int]] = []
    previous = False
    for token, wanted in zip(ids.tolist(), predicted.tolist(), strict=True):
        if wanted and not previous:
            runs.append([])
        if wanted:
            runs[-1].append(token)
        previous = wanted
    return [tokenizer.decode(run) for run in runs]


def test_smollm2_answers_are_the_assistants_turns_with_their_end(smollm2: Any) -> None:
    wanted = [f"{m['content']}<|im_end|>" for m in CHAT if m["role"] == "assistant"]
    assert predicted_text(smollm2, chat(*CHAT)) == wanted
    # The default system prompt and the questions are there, and are not predicted.
    ids, predicted = tokenize(chat(*CHAT), smollm2, "answers")
    whole = smollm2.apply_chat_template(list(CHAT), tokenize=True, return_dict=True)["input_ids"]
    assert ids.tolist() == list(whole)
    assert 0 < predicted.sum() < len(ids) / 2


def test_smollm2_prompt_tokens_are_those_of_generation(smollm2: Any) -> None:
    """What the model is asked to continue in training is what it is asked to continue in use."""
    from flexidepth.generation.inputs import chat_ids

    ids, predicted = tokenize(chat(*CHAT[:2]), smollm2, "answers")
    first = int(predicted.argmax())
    assert ids[:first].tolist() == chat_ids([dict(CHAT[0])], smollm2)


def test_system_prompts_questions_and_openings_of_the_assistant(tokenizer: Any) -> None:
    system = {"role": "system", "content": "Say little."}
    assert predicted_text(tokenizer, chat(system, *CHAT[:2])) == ["It is 4.</s>"]
    assert predicted_text(tokenizer, chat(*CHAT[:1])) == []
    two = ({"role": "assistant", "content": "One."}, {"role": "assistant", "content": "Two."})
    assert predicted_text(tokenizer, chat(CHAT[0], *two)) == ["One.</s>", "Two.</s>"]


def test_everything_is_predicted_unless_answers_are_asked_for(tokenizer: Any) -> None:
    (text,) = predicted_text(tokenizer, chat(*CHAT), "all")
    assert text == tokenizer.apply_chat_template(list(CHAT), tokenize=False)


def test_a_plain_text_ends_and_is_predicted_whole(tokenizer: Any) -> None:
    for loss_on in ("all", "answers"):
        assert predicted_text(tokenizer, Document("", text="Hi"), loss_on) == ["Hi</s>"]
    begins = byte_tokenizer(adds_bos=True)
    ids, _ = tokenize(Document("", text="Hi"), begins)
    assert begins.decode(ids) == "<s>Hi</s>"


def test_a_template_that_marks_its_answers(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}"
        "{% else %}{{ '<s>' + m['content'] }}{% endif %}{% endfor %}"
    )
    assert predicted_text(tokenizer, chat(*CHAT[:2])) == ["It is 4.</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace(
        "message['content']",
        "(message['content'] if loop.last else message['content'][:3])",
    )
    with pytest.raises(UnsupportedError, match="here: this chat template writes a turn otherwise"):
        tokenize(chat(*CHAT), tokenizer, "answers")
    tokenize(chat(*CHAT), tokenizer, "all")


def test_what_a_tokenizer_cannot_do_is_said_before_anything_is_read(tokenizer: Any) -> None:
    with pytest.raises(ValueOutOfRangeError, match="loss_on is 'answer'"):
        check_tokenizer(tokenizer, "answer")
    with pytest.raises(UnsupportedError, match="without a tokenizer"):
        check_tokenizer(None, "all")
    tokenizer.eos_token = None
    with pytest.raises(UnsupportedError, match="no end token"):
        check_tokenizer(tokenizer, "all")


def test_templates_that_refuse_or_are_missing(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('users first') }}"
    with pytest.raises(DataError, match=r"here: the chat template refuses it: .*users first"):
        tokenize(chat(*CHAT), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match=r"here: a conversation, but .* no chat template"):
        tokenize(chat(*CHAT), tokenizer)


def test_the_identity_of_a_tokenizer_is_what_it_makes_not_what_it_did(tokenizer: Any) -> None:
    before = tokenizer_identity(tokenizer)
    tokenizer(["a", "abc"], truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_identity(tokenizer) == before
    assert tokenizer_identity(byte_tokenizer(CHATML)) == before
    assert tokenizer_identity(byte_tokenizer(CHATML + " ")) != before
    assert tokenizer_identity(byte_tokenizer(CHATML, adds_bos=True)) != before
