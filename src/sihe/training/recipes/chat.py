"""Conversations as tokens, with a mask of those that the assistant says: the only ones that a chat model learns.

Which part of the text is the assistant's is asked of the template itself, in one of two ways. A template may mark it
with `{% generation %} … {% endgeneration %}`, as transformers reads it. Where it does not, the text up to a turn with
the generation prompt must be the beginning of the text with the turn: what lies between is the turn, its end marker
included. A template for which neither holds is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from sihe.core.errors import CorruptData, InvalidInput, NotFound
from sihe.training.recipes.errors import NoAssistantTurn, OpaqueTemplate

Message = Mapping[str, str]
"""`role` and `content`."""
Span = tuple[int, int]
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text holds them (Unicode 15, section 23.7)


@dataclass(frozen=True)
class MaskedTokens:
    """Token ids, and for each whether the assistant says it."""

    token_ids: tuple[int, ...]
    mask: tuple[bool, ...]


class ChatTokenizer:
    """A tokenizer with its chat template. Conversations are sequences of messages with `role` and `content`."""

    def __init__(self, tokenizer: Tokenizer, template: str, special: Mapping[str, str]) -> None:
        self.tokenizer = tokenizer
        self._special = dict(special)
        self._render = _compile(template)
        self._marks_turns = any(mark in template for mark in ("{% generation", "{%- generation"))

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """The tokenizer of a model folder or data set. Raises `NotFound` without a template, `CorruptData`."""
        try:
            config = json.loads((folder / "tokenizer_config.json").read_bytes())
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except OSError as error:
            raise NotFound(
                "tokenizer", str(folder), hint="it takes tokenizer.json and tokenizer_config.json"
            ) from error
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise CorruptData(folder / "tokenizer.json", str(error)) from error
        template = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if not isinstance(template, str):
            raise NotFound("chat template", str(folder), hint="add chat_template to its tokenizer_config.json")
        special = {key: _text(value) for key, value in config.items() if key.endswith("_token") and value is not None}
        return cls(tokenizer, template, special)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the assistant speaks."""
        text, _ = _unmarked(self._write(messages, add_generation_prompt=True))
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode(self, messages: Sequence[Message], *, max_tokens: int | None = None) -> MaskedTokens:
        """A whole conversation; a token counts as the assistant's when any of its characters is.

        What lies beyond `max_tokens` is cut off. Raises `NoAssistantTurn` when nothing that the assistant says is left,
        `OpaqueTemplate`, and `InvalidInput` where the template refuses the messages.
        """
        if not any(message.get("role") == "assistant" for message in messages):
            raise NoAssistantTurn(
                f"a conversation needs a turn with role 'assistant', got {[m.get('role') for m in messages]}"
            )
        text, spans = self._spans(messages)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        mask = [any(start < end and a < end and start < b for a, b in spans) for start, end in encoding.offsets]
        ids, mask = encoding.ids[:max_tokens], mask[:max_tokens]
        if not any(mask):
            raise NoAssistantTurn(
                f"no token of the assistant lies within the first {max_tokens} of {len(encoding.ids)}: "
                "raise the context, or leave this conversation out"
            )
        return MaskedTokens(tuple(ids), tuple(mask))

    def _spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text and the character spans of what the assistant says."""
        marked = self._write(messages)
        if self._marks_turns:
            return _unmarked(marked)
        spans = []
        for number, message in enumerate(messages):
            if message.get("role") == "assistant":
                before = self._write(messages[:number], add_generation_prompt=True)
                through = self._write(messages[: number + 1])
                if not (through.startswith(before) and marked.startswith(through)):
                    raise OpaqueTemplate(
                        f"the chat template rewrites what comes before message {number}, so that the assistant's turn "
                        "cannot be found: mark it with {% generation %} … {% endgeneration %}"
                    )
                spans.append((len(before), len(through)))
        return marked, spans

    def _write(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        for message in messages:
            if any(mark in message.get("content", "") for mark in (_OPEN, _CLOSE)):
                raise InvalidInput("a message holds U+FDD0 or U+FDD1, which are no characters: remove them")
        try:
            return self._render(messages=messages, add_generation_prompt=add_generation_prompt, **self._special)
        except TemplateError as error:
            raise InvalidInput(f"the chat template refuses these messages: {error}") from error


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without its marks, and where they were."""
    plain, spans = "", []
    for number, part in enumerate(text.split(_OPEN)):
        said, closed, rest = part.partition(_CLOSE)
        if number:
            spans.append((len(plain), len(plain) + len(said)))
        plain += said + rest if closed else part
    return plain, spans


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _compile(template: str) -> Callable[..., str]:
    # A template is code that came with the weights: it runs in a sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template).render
    except TemplateError as error:
        raise InvalidInput(f"the chat template cannot be read: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _text(value: Any) -> str:
    return cast("str", value["content"] if isinstance(value, dict) else value)
