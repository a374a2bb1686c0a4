"""The model's own tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sihe.core.errors import CorruptData, InvalidInput
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.types import ChatMessage
from support.tiny_models import tiny_model

TALK = (ChatMessage("user", "pack\n my box — 你好"), ChatMessage("assistant", "jugs"), ChatMessage("user", "fox"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


def configure(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_chats_read_as_transformers_renders_them(folder: Path) -> None:
    configure(folder, tokenizer_class="PreTrainedTokenizerFast")
    reference = AutoTokenizer.from_pretrained(folder)
    assert isinstance(reference, PreTrainedTokenizerFast)
    messages = [{"role": message.role, "content": message.content} for message in TALK]
    tokenizer = ModelTokenizer.load(folder)
    assert tokenizer.render_chat(TALK) == reference.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.encode("the fox — 你好") == reference.encode("the fox — 你好")


def test_a_chat_ends_where_the_template_ends_a_turn(folder: Path) -> None:
    tokenizer = ModelTokenizer.load(folder)
    assert (tokenizer.stop_ids, tokenizer.chat_stop_ids) == ({1}, {1, 4})  # <|eos|>, and <|end|> in chats


def test_a_template_is_code_from_outside_and_stays_in_its_box(folder: Path) -> None:
    configure(folder, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidInput, match="refuses"):
        ModelTokenizer.load(folder).render_chat(TALK)
    configure(folder, chat_template="{% for %}")
    with pytest.raises(CorruptData, match="chat_template"):
        ModelTokenizer.load(folder)


def test_a_model_without_a_template_says_what_to_do(folder: Path) -> None:
    configure(folder, chat_template=None)
    with pytest.raises(InvalidInput, match="/v1/completions"):
        ModelTokenizer.load(folder).render_chat(TALK)
