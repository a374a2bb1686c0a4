"""Tools that a model may call, and calls of them. Values only; what a model's own notation of a call is, `tool_calls`
knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sihe.core.errors import InvalidInput

ToolChoice = Literal["auto", "none", "required"]

MAX_TOOLS = 128  # OpenAI's limit
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool as OpenAI writes it: `{"type": "function", "function": {"name": …, "parameters": {JSON schema}}}`.

    The template gets the `definition` as it came.
    """

    definition: Mapping[str, object]

    def __post_init__(self) -> None:
        if self.definition.get("type") != "function":
            raise InvalidInput(f"tools: only the type 'function' is known, got {self.definition.get('type')!r}")
        function = self.definition.get("function")
        if not isinstance(function, Mapping):
            raise InvalidInput("tools: each has a 'function' with its name and parameters")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidInput(f"tools: a name has 1 to 64 letters, digits, '_', '-' or '.', got {name!r}")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InvalidInput(f"tools: the parameters of {name!r} must be a JSON schema object")

    @property
    def name(self) -> str:
        """What a call names."""
        return str(self._function["name"])

    @property
    def parameters(self) -> Mapping[str, object]:
        """The JSON schema of the arguments; any object where none was given."""
        given = self._function.get("parameters")
        return given if isinstance(given, Mapping) and given else {"type": "object"}

    @property
    def _function(self) -> Mapping[str, object]:
        function = self.definition["function"]
        assert isinstance(function, Mapping)
        return function


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model made. `arguments` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call number `index`: the first one has its `id` and `name`, each adds to the arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


def check_choice(tools: Sequence[Tool], choice: ToolChoice, forced: str | None) -> None:
    """Raises `InvalidInput` where the tools and the choice among them contradict each other."""
    if len(tools) > MAX_TOOLS:
        raise InvalidInput(f"at most {MAX_TOOLS} tools, got {len(tools)}")
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise InvalidInput("tools: two have the same name")
    if choice == "required" and not tools:
        raise InvalidInput("tool_choice demands a call and there are no tools: give some")
    if forced is not None and (choice != "required" or forced not in names):
        raise InvalidInput(f"tool_choice names {forced!r}, which is not among the tools: {', '.join(names) or 'none'}")


def join_deltas(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """The same pieces with those of one call joined."""
    joined: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        before = joined.get(delta.index)
        joined[delta.index] = (
            delta
            if before is None
            else ToolCallDelta(delta.index, before.arguments + delta.arguments, before.id, before.name)
        )
    return tuple(joined.values())


def whole_calls(deltas: Sequence[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The calls that all pieces of an answer make."""
    return tuple(ToolCall(delta.id or "", delta.name or "", delta.arguments) for delta in join_deltas(deltas))
