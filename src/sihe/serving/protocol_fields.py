"""The parts of OpenAI's requests that have a shape of their own: messages, tools, and what an answer must look like."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sihe.core.errors import InvalidInput
from sihe.serving.engine.tools import Tool, ToolCall, ToolChoice
from sihe.serving.engine.types import ChatMessage, Constraint
from sihe.serving.errors import InvalidRequest, UnsupportedParameter


class Part(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class CalledFunction(BaseModel):
    """What an assistant called."""

    name: str = Field(min_length=1)
    arguments: str = "{}"


class Call(BaseModel):
    """A call in an assistant's earlier turn."""

    id: str = ""
    type: str = "function"
    function: CalledFunction


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(min_length=1)
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    def to_chat(self) -> ChatMessage:
        """The same for the engine. Raises `UnsupportedParameter` for what is not text."""
        parts = self.content if isinstance(self.content, list) else []
        for part in parts:
            if part.type != "text":
                raise UnsupportedParameter("messages", part.type, hint="messages carry text only")
        text = self.content if isinstance(self.content, str) else "".join(part.text or "" for part in parts)
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        return ChatMessage(self.role, text, self.name, calls, self.tool_call_id)


class StructuredOutputs(BaseModel):
    """vLLM's form of a constraint: exactly one of the fields."""

    model_config = ConfigDict(extra="forbid")

    json_: Any = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


def tools_of(
    tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None
) -> tuple[tuple[Tool, ...], ToolChoice, str | None]:
    """The tools, which of them may or must be called, and the one that is named. Raises `InvalidRequest`."""
    try:
        made = tuple(Tool(tool) for tool in tools or ())
    except InvalidInput as error:
        raise InvalidRequest("tools", str(error)) from error
    if choice is None or choice == "auto":
        return made, "auto", None
    if choice == "none":
        return made, "none", None
    if choice == "required":
        return made, "required", None
    function = choice.get("function") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(function, dict):
        name = function.get("name")
        if isinstance(name, str):
            return made, "required", name
    raise InvalidRequest(
        "tool_choice",
        f"tool_choice is none, auto, required or {{'type': 'function', 'function': {{'name': …}}}}, got {choice!r}",
    )


def constraint_of(
    response_format: dict[str, Any] | None,
    structured: StructuredOutputs | None,
    guided: Mapping[str, Any],
) -> Constraint | None:
    """What the answer must look like, said in OpenAI's way or in one of vLLM's. Raises `InvalidRequest`.

    `guided` has vLLM's older fields, `guided_json` and so on.
    """
    found = [
        constraint
        for constraint in (
            None if response_format is None else _of_format(response_format),
            None if structured is None else _of_structured(structured),
            *(_of_kind(name.removeprefix("guided_"), value, name) for name, value in guided.items()),
        )
        if constraint is not None
    ]
    if len(found) > 1:
        raise InvalidRequest("response_format", "an answer has one constraint: give one of the fields that set it")
    return found[0] if found else None


def _of_format(value: Mapping[str, Any]) -> Constraint | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json_object", "")
    if kind == "json_schema":
        described = value.get("json_schema")
        if not isinstance(described, Mapping) or not isinstance(described.get("name", ""), str):
            raise InvalidRequest("response_format", "response_format.json_schema is an object with name and schema")
        return _of_kind("json", described.get("schema") or {}, "response_format")
    raise UnsupportedParameter("response_format", kind, hint="use text, json_object or json_schema")


def _of_structured(value: StructuredOutputs) -> Constraint | None:
    given = {"json": value.json_, "regex": value.regex, "choice": value.choice, "grammar": value.grammar}
    found = [
        _of_kind(kind, content, "structured_outputs") for kind, content in given.items() if content is not None
    ] + ([Constraint("json_object", "")] if value.json_object else [])
    if len(found) != 1:
        raise InvalidRequest("structured_outputs", f"structured_outputs has exactly one constraint, got {len(found)}")
    return found[0]


def _of_kind(kind: str, value: object, parameter: str) -> Constraint | None:
    if value is None:
        return None
    if kind == "json":
        if isinstance(value, str):
            return Constraint("json_schema", value)
        if isinstance(value, Mapping):
            return Constraint("json_schema", json.dumps(value, ensure_ascii=False))
        raise InvalidRequest(parameter, f"{parameter}: a JSON schema is an object, got {type(value).__name__}")
    if kind == "choice":
        return Constraint("choice", json.dumps(value, ensure_ascii=False))
    assert isinstance(value, str), "its model has checked it"
    return Constraint("regex" if kind == "regex" else "grammar", value)
