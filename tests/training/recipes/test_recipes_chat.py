"""Chat templates and loss masks: exact masks, transformers' masks, and templates that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sihe.core.errors import InvalidInput, NotFound
from sihe.training.recipes.arithmetic import ASSISTANT, END, USER, arithmetic_chat, write_tokenizer
from sihe.training.recipes.chat import ChatTokenizer
from sihe.training.recipes.errors import NoAssistantTurn, OpaqueTemplate
from support.tiny_models import TEMPLATE, tiny_tokenizer

TALK = [
    {"role": "user", "content": "the quick fox"},
    {"role": "assistant", "content": "jumps over"},
    {"role": "user", "content": "你好 — héllo 🙂"},
    {"role": "assistant", "content": "pack my box 🙂"},
]
MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(template: str) -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer(), template, {"bos_token": "<|bos|>"})


def said(tokenizer: Tokenizer, encoded_ids: tuple[int, ...], mask: tuple[bool, ...]) -> str:
    kept = [token for token, counts in zip(encoded_ids, mask, strict=True) if counts]
    text: str = tokenizer.decode(kept, skip_special_tokens=False)
    return text


def test_an_exact_mask() -> None:
    encoded = arithmetic_chat().encode([{"role": "user", "content": "2+3"}, {"role": "assistant", "content": "5"}])
    two, plus, three, five = 4 + 2, 4 + 10, 4 + 3, 4 + 5
    assert encoded.token_ids == (USER, two, plus, three, ASSISTANT, five, END)
    assert encoded.mask == (False, False, False, False, False, True, True)


def test_what_counts_is_what_the_assistant_says_and_its_end() -> None:
    encoded = chat(TEMPLATE).encode(TALK)
    assert said(tiny_tokenizer(), encoded.token_ids, encoded.mask) == "jumps over<|end|>pack my box 🙂<|end|>"


def test_a_template_with_marks_gives_transformers_masks() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), chat_template=MARKED)
    expected = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    encoded = chat(MARKED).encode(TALK)
    assert list(encoded.token_ids) == expected["input_ids"]
    assert [int(counts) for counts in encoded.mask] == expected["assistant_masks"]
    assert sum(encoded.mask) > 4


def test_the_prompt_is_the_beginning_of_the_conversation() -> None:
    tokenizer = chat(MARKED)
    prompt = tokenizer.prompt(TALK[:1])
    assert tuple(prompt) == tokenizer.encode(TALK[:2]).token_ids[: len(prompt)]
    assert (
        tuple(prompt)
        == chat(MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
        .encode(TALK[:2])
        .token_ids[: len(prompt)]
    )


def test_a_template_that_rewrites_the_past_is_refused() -> None:
    template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(OpaqueTemplate, match=r"generation"):
        chat(template).encode(TALK)


def test_a_conversation_without_an_answer_is_refused() -> None:
    with pytest.raises(NoAssistantTurn, match="assistant"):
        chat(TEMPLATE).encode([])
    with pytest.raises(NoAssistantTurn, match="'user'"):
        chat(TEMPLATE).encode(TALK[:1])


def test_what_is_too_long_is_cut_off_and_refused_when_nothing_is_left_to_learn() -> None:
    whole = chat(TEMPLATE).encode(TALK)
    first = whole.mask.index(True)
    cut = chat(TEMPLATE).encode(TALK, max_tokens=first + 2)
    assert cut.token_ids == whole.token_ids[: first + 2]
    assert sum(cut.mask) == 2
    with pytest.raises(NoAssistantTurn, match=f"first {first} of {len(whole.token_ids)}"):
        chat(TEMPLATE).encode(TALK, max_tokens=first)


def test_a_refusal_of_the_template_arrives_as_bad_input() -> None:
    with pytest.raises(InvalidInput, match="unknown role"):
        chat(TEMPLATE).encode([{"role": "wizard", "content": "x"}, *TALK])


def test_the_marks_cannot_be_smuggled_in() -> None:
    with pytest.raises(InvalidInput, match="U\\+FDD0"):
        chat(MARKED).encode([{"role": "user", "content": "\ufdd0all mine\ufdd1"}, TALK[1]])


def test_a_template_runs_in_a_sandbox() -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidInput, match="unsafe"):
        chat(template).encode(TALK)


def test_a_model_folder_brings_its_template(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    loaded = ChatTokenizer.load(tmp_path)
    talk = [{"role": "user", "content": "12-7"}, {"role": "assistant", "content": "12-7=5"}]
    assert loaded.encode(talk) == arithmetic_chat().encode(talk)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    with pytest.raises(NotFound, match="chat template"):
        ChatTokenizer.load(tmp_path)
    with pytest.raises(NotFound, match="tokenizer"):
        ChatTokenizer.load(tmp_path / "absent")
