"""The chat templates beside a model's weights: conversations, tools and options in, the model's own text out.

A template is code from outside and runs in a sandbox; what it may use is what transformers gives it
(https://huggingface.co/docs/transformers/chat_templating_writing). As there, a special token that a user's text spells
out becomes that token: templates mark turns by text, and the tokenizer cannot tell who wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sihe.core.errors import CorruptData, InvalidInput
from sihe.serving.engine.tool_calls import ToolFormat, detect_format
from sihe.serving.engine.tools import ToolCall
from sihe.serving.engine.types import ChatMessage, GenerationRequest

_OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class ChatTemplates:
    """A model's templates: the usual one, and where there is one, another for conversations with tools."""

    def __init__(self, sources: Mapping[str, str], special: Mapping[str, str], *, folder: Path) -> None:
        self._special = special
        self._folder = folder
        self._sources = sources
        self._render = {name: _compile(source, folder) for name, source in sources.items()}

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any]) -> ChatTemplates:
        """What `folder` has, where `config` is its tokenizer_config.json. Raises `CorruptData`."""
        given = config.get("chat_template") or {}
        if isinstance(given, list):
            sources = {item["name"]: item["template"] for item in given if {"name", "template"} <= item.keys()}
        else:
            sources = {"default": given} if given else {}
        file = folder / "chat_template.jinja"
        if file.is_file():
            sources["default"] = file.read_text(encoding="utf-8")
        for more in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[more.stem] = more.read_text(encoding="utf-8")
        special = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in config.items()
            if key.endswith("_token") and value is not None
        }
        return cls(sources, special, folder=folder)

    def __bool__(self) -> bool:
        return "default" in self._render

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls."""
        return detect_format(self._sources.get("tool_use", self._sources.get("default", "")))

    def render(self, request: GenerationRequest) -> str:
        """The text of a request's conversation, up to where the assistant speaks. Raises `InvalidInput`."""
        if not self:
            raise InvalidInput(
                f"the model in {self._folder.name!r} has no chat template: use /v1/completions, "
                "or add chat_template to its tokenizer_config.json"
            )
        messages = request.messages or ()
        options = dict(request.template_options)
        taken = [name for name in (*_OWN, *self._special) if name in options]
        if taken:
            raise InvalidInput(f"chat_template_kwargs cannot set {taken[0]!r}: the server does")
        tools = [dict(tool.definition) for tool in request.tools] if request.uses_tools else None
        name = "tool_use" if tools and "tool_use" in self._render else "default"
        if tools and "tools" not in self._sources[name]:
            raise InvalidInput(
                f"the chat template of the model in {self._folder.name!r} knows no tools: leave them out"
            )
        last = messages[-1].content if request.continue_last else ""
        if request.continue_last and not last.strip():
            raise InvalidInput("continue_final_message needs a last message with text to go on from")
        try:
            text = self._render[name](
                **{
                    **options,
                    **self._special,
                    "messages": [_message(message) for message in messages],
                    "tools": tools,
                    "add_generation_prompt": not request.continue_last,
                }
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidInput(f"the model's chat template refuses these messages: {error}") from error
        return _until(text, last) if request.continue_last else text

    def ending(self, said: str) -> str:
        """What the template writes after an assistant's turn; nothing where it refuses."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": said}]
        try:
            text = self._render["default"](messages=turns, tools=None, add_generation_prompt=False, **self._special)
        except (TemplateError, TypeError, ValueError, LookupError):
            return ""
        return text.rpartition(said)[2]


def _message(message: ChatMessage) -> dict[str, object]:
    """A turn as templates expect it: optional parts are absent, the arguments of a call are an object."""
    turn: dict[str, object] = {"role": message.role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    return turn


def _call(call: ToolCall) -> dict[str, object]:
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError as error:
        raise InvalidInput(f"the arguments of the tool call {call.name!r} are no JSON: {error}") from error
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _until(text: str, last: str) -> str:
    """The rendered text up to the end of the last message, as transformers cuts it."""
    at = text.rfind(last.strip())
    if at < 0:
        raise InvalidInput(
            "continue_final_message: the chat template changes the last message, so it has no end to find"
        )
    whole = last.lstrip()
    return text[: at + len(whole)] if text.startswith(whole, at) else text[: at + len(last.strip())]


class _Generation(Extension):
    """`{% generation %}`: marks what the assistant says, for training. Here its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, folder: Path) -> Callable[..., str]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source).render
    except TemplateError as error:
        raise CorruptData(folder / "tokenizer_config.json", f"chat_template: {error}") from error


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers, not as in jinja2, which escapes what HTML would read."""
    pair = (separators[0], separators[1]) if separators else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
