"""The model's own tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sihe.core.errors import CorruptData, InvalidInput
from sihe.serving.engine.tokenizer import ModelTokenizer
from sihe.serving.engine.tools import Tool, ToolCall
from sihe.serving.engine.types import ChatMessage, GenerationRequest
from sihe.serving.errors import ContextTooLong
from support.tiny_models import tiny_model

TOOL = Tool(
    {
        "type": "function",
        "function": {"name": "add", "description": "Sums <b>", "parameters": {"type": "object", "properties": {}}},
    }
)
TALK = (ChatMessage("user", "pack\n my box — 你好"), ChatMessage("assistant", "jugs"), ChatMessage("user", "fox"))


def talk(*more: ChatMessage, **fields: object) -> GenerationRequest:
    return GenerationRequest(messages=(*TALK, *more), **fields)  # type: ignore[arg-type]


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
    assert tokenizer.templates.render(talk()) == reference.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.encode("the fox — 你好") == reference.encode("the fox — 你好")


def test_a_chat_ends_where_the_template_ends_a_turn(folder: Path) -> None:
    tokenizer = ModelTokenizer.load(folder)
    assert (tokenizer.stop_ids, tokenizer.chat_stop_ids) == ({1}, {1, 4})  # <|eos|>, and <|end|> in chats


def test_a_template_is_code_from_outside_and_stays_in_its_box(folder: Path) -> None:
    configure(folder, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidInput, match="refuses"):
        ModelTokenizer.load(folder).templates.render(talk())
    configure(folder, chat_template="{% for %}")
    with pytest.raises(CorruptData, match="chat_template"):
        ModelTokenizer.load(folder)


def test_a_model_without_a_template_says_what_to_do(folder: Path) -> None:
    configure(folder, chat_template=None)
    with pytest.raises(InvalidInput, match="/v1/completions"):
        ModelTokenizer.load(folder).templates.render(talk())


# ---- beside transformers ---------------------------------------------------------------------------------------------

WITH_TOOLS = (
    "{%- if tools %}{{ 'TOOLS ' + tools | tojson(indent=2) }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}<|assistant|>{% generation %}{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>"
    "{%- if loop.index > 3 %}{% break %}{% endif %}{% endfor %}<|end|>{% endgeneration %}"
    "{%- else %}<|{{ message.role }}|>{{ message.content }}{{ message.tool_call_id or '' }}<|end|>{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% if not think %}<|bos|>{% endif %}{% endif %}"
)
CALL = ToolCall("call_1", "add", '{"x": 1, "你": "<好>"}')


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ((), {}),
        ((), {"tools": (TOOL,)}),
        (
            (ChatMessage("assistant", "", tool_calls=(CALL,)), ChatMessage("tool", "3", tool_call_id="call_1")),
            {"tools": (TOOL,)},
        ),
        ((), {"template_options": {"think": True}}),
        ((ChatMessage("assistant", " It  is "),), {"continue_last": True}),
    ],
)
def test_tools_and_options_read_as_transformers_renders_them(
    folder: Path, more: tuple[ChatMessage, ...], fields: dict[str, Any]
) -> None:
    configure(folder, tokenizer_class="PreTrainedTokenizerFast", chat_template=WITH_TOOLS)
    reference = AutoTokenizer.from_pretrained(folder)
    messages: list[dict[str, Any]] = [
        {"role": message.role, "content": message.content}
        | ({"tool_call_id": message.tool_call_id} if message.tool_call_id else {})
        | (
            {
                "tool_calls": [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": json.loads(call.arguments)},
                    }
                    for call in message.tool_calls
                ]
            }
            if message.tool_calls
            else {}
        )
        for message in (*TALK, *more)
    ]
    continues = fields.get("continue_last", False)
    expected = reference.apply_chat_template(
        messages,
        tools=[dict(tool.definition) for tool in fields.get("tools", ())] or None,
        tokenize=False,
        add_generation_prompt=not continues,
        continue_final_message=continues,
        **fields.get("template_options", {}),
    )
    tokenizer = ModelTokenizer.load(folder)
    request = talk(*more, **fields)
    assert tokenizer.templates.render(request) == expected
    assert tokenizer.encode_chat(request) == reference.encode(expected, add_special_tokens=False)


def test_tools_have_a_template_of_their_own_where_the_model_has_one(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    configure(folder, chat_template=named)
    tokenizer = ModelTokenizer.load(folder)
    assert tokenizer.templates.render(talk()) == "plain"
    assert tokenizer.templates.render(talk(tools=(TOOL,))) == "1 tools"
    assert tokenizer.templates.render(talk(tools=(TOOL,), tool_choice="none")) == "plain"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("from a file{{ tools }}"[:11] + "{# tools #}")
    assert ModelTokenizer.load(folder).templates.render(talk(tools=(TOOL,))) == "from a file"


@pytest.mark.parametrize(
    ("more", "fields", "expected"),
    [
        ((), {"tools": (TOOL,)}, "knows no tools"),
        ((), {"template_options": {"messages": []}}, "'messages'"),
        ((), {"template_options": {"bos_token": ""}}, "'bos_token'"),
        ((ChatMessage("assistant", ""),), {"continue_last": True}, "go on from"),
        ((ChatMessage("assistant", "", tool_calls=(ToolCall("1", "f", "{"),)),), {}, "no JSON"),
        ((ChatMessage("wizard", "x"),), {}, "unknown role"),
    ],
)
def test_what_a_template_cannot_render_is_said(
    folder: Path, more: tuple[ChatMessage, ...], fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidInput, match=expected):
        ModelTokenizer.load(folder).templates.render(talk(*more, **fields))


def test_marked_special_tokens_are_read_and_others_are_not(folder: Path) -> None:
    tokenizer = ModelTokenizer.load(folder)
    user, end = tokenizer.special_id("<|user|>"), tokenizer.special_id("<|end|>")
    assert user is not None
    assert end is not None
    assert tokenizer.special_id("fox") is None
    decoder = tokenizer.decoder(("<|user|>", "absent"))
    ids = [*tokenizer.encode("the fox 你")[:-1], user, end, *tokenizer.encode("fox")]
    text = "".join(decoder.push(id) for id in ids) + decoder.flush()
    assert text.endswith("<|user|>fox")
    assert "<|end|>" not in text


def test_a_token_is_reported_with_its_own_bytes(folder: Path) -> None:
    tokenizer = ModelTokenizer.load(folder)
    ids = tokenizer.encode("héllo 🙂 🦊")
    assert b"".join(tokenizer.token_bytes(id) for id in ids).decode() == "héllo 🙂 🦊"
    assert tokenizer.token_bytes(1) == b"<|eos|>"
    spelled = tokenizer.spell(ids[-1], -1.5, [(1, -2.0)])
    assert spelled.text == "\ufffd"
    assert spelled.top[0].text == "<|eos|>"


def test_a_text_far_too_long_is_refused_before_it_is_read(folder: Path) -> None:
    tokenizer = ModelTokenizer.load(folder)
    longest = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))
    fits = "x" * (100 * longest)
    assert len(tokenizer.encode(fits, limit=100)) >= 100  # the exact count is the engine's to judge
    with pytest.raises(ContextTooLong) as caught:
        tokenizer.encode(fits + "x" * longest, limit=100)
    assert caught.value.actual == 101
    with pytest.raises(ContextTooLong):
        tokenizer.encode_chat(talk(ChatMessage("user", "你" * 5000)), limit=100)
