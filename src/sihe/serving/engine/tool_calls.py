"""Calls of tools in the notation that a model writes: found in its text as it comes, and enforced by a grammar.

| format | notation |
|---|---|
| hermes | `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one after the other (Hermes, Qwen) |
| mistral | `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` |
| llama3 | the whole answer is `{"name": …, "parameters": {…}}`, more of them after `;` |
| plain | the same with "arguments", or a list of them: for templates that show tools in words of their own |

Arguments are handed out as they come. Text that only looks like a call (without a marker, or naming no known tool) is
text. Each format's own description: https://huggingface.co/docs/transformers/chat_extras (tool use) and the chat
templates of the families.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sihe.core.ids import new_id
from sihe.serving.engine.call_reader import CallReader
from sihe.serving.engine.tools import Tool, ToolCallDelta
from sihe.serving.engine.types import Constraint, GenerationRequest

ToolFormat = Literal["hermes", "mistral", "llama3", "plain"]

MARKERS: Mapping[ToolFormat, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "llama3": ("<|python_tag|>",),
    "plain": (),
}
_MAX_FORCED_CALLS = 8  # of one enforced answer: a model that has lost its way calls for ever


def detect_format(template: str) -> ToolFormat:
    """The notation that a chat template teaches, by its markers."""
    if "<tool_call>" in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or ("ipython" in template and '"parameters"' in template):
        return "llama3"
    return "plain"


def enforce(format: ToolFormat, request: GenerationRequest, special: Callable[[str], int | None]) -> Constraint:
    """What makes an answer one or several calls of the request's tools with arguments that obey their schemas.

    `special` gives the id of a marker that is a special token, which no text spells.
    """
    tools = [tool for tool in request.tools if request.forced_tool in (None, tool.name)]
    rules = [f"tool_{at}: %json {json.dumps(_schema(format, tool))}" for at, tool in enumerate(tools)]
    rules.append("call: " + " | ".join(f"tool_{at}" for at in range(len(tools))))
    more = _MAX_FORCED_CALLS - 1 if request.parallel_tool_calls and request.forced_tool is None else 0

    def marker(text: str) -> str:
        id = special(text)
        return json.dumps(text) if id is None else f"<[{id}]>"

    def repeated(between: str) -> str:
        return f"call ({between} call){{0,{more}}}" if more else "call"

    if format == "hermes":
        opening, closing = marker("<tool_call>"), marker("</tool_call>")
        rules.append(f'wrapped: {opening} "\\n" call "\\n" {closing}')
        start = f'wrapped ("\\n" wrapped){{0,{more}}}' if more else "wrapped"
    elif format == "mistral":
        start = f'{marker("[TOOL_CALLS]")} "[" {repeated(", ".join([json.dumps(", ")]))} "]"'
    elif format == "llama3":
        start = repeated(json.dumps("; "))
    else:
        start = f'"[" {repeated(json.dumps(", "))} "]"' if more else "call"
    return Constraint("tools", "\n".join([f"start: {start}", *rules]) + "\n")


def _schema(format: ToolFormat, tool: Tool) -> dict[str, object]:
    key = "parameters" if format == "llama3" else "arguments"
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, key: _moved(tool.parameters, f"#/properties/{key}")},
        "required": ["name", key],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"},
    }


def _moved(schema: object, root: str) -> object:
    """A schema whose references, which start at its own root, start at `root` instead."""
    if isinstance(schema, Mapping):
        return {
            key: root + value[1:]
            if key == "$ref" and isinstance(value, str) and value[:1] == "#"
            else _moved(value, root)
            for key, value in schema.items()
        }
    return [_moved(item, root) for item in schema] if isinstance(schema, list) else schema


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a piece of an answer turned out to be."""

    text: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class ToolCallParser:
    """Splits an answer, as it comes, into text and calls of `names`.

    `has_calls` once one began; `is_finished` when there is one and no more are wanted.
    """

    def __init__(self, format: ToolFormat, names: Sequence[str], *, parallel: bool = True) -> None:
        self._format = format
        self._names = frozenset(names)
        self._parallel = parallel
        self._held = ""  # text of which it is not known yet what it is
        self._text: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._reader: CallReader | None = None
        self._raw = ""  # what the reader has read, while it may still be text
        self._count = 0
        self._is_listed = False
        self._state: Callable[[], bool] = self._find_marker if MARKERS[format] and format != "llama3" else self._begin
        self.is_finished = False

    @property
    def has_calls(self) -> bool:
        """Whether a call has begun."""
        return self._count > 0

    def push(self, text: str) -> Parsed:
        """What is certain with `text`."""
        self._held += text
        while self._held and self._state():
            continue
        return self._take()

    def flush(self) -> Parsed:
        """What was held back, when no more text comes."""
        if self._reader is not None:
            self._text.append("" if self._is_certain() else self._raw)
        elif self._state != self._after and not (self.has_calls and self._held.isspace()):
            self._text.append(self._held)
        self._held, self._reader = "", None
        return self._take()

    def _take(self) -> Parsed:
        parsed = Parsed("".join(self._text), tuple(self._calls))
        self._text, self._calls = [], []
        return parsed

    # ---- states: each reads what it can from the held text, and says whether another may go on ----------------------

    def _find_marker(self) -> bool:
        """Text, up to a marker or to what could become one; white space before a marker is none of the text."""
        marker = MARKERS[self._format][0]
        at = self._held.find(marker)
        if at >= 0:
            self._text.append(self._held[:at].rstrip())
            self._held = self._held[at + len(marker) :]
            self._state = self._open
            return True
        keep = next((size for size in range(len(marker) - 1, 0, -1) if self._held.endswith(marker[:size])), 0)
        certain = self._held[: len(self._held) - keep].rstrip()
        self._text.append(certain)
        self._held = self._held[len(certain) :]
        return False

    def _begin(self) -> bool:
        """The beginning of an answer that is a call as a whole, or none."""
        marker = next(iter(MARKERS[self._format]), "")
        rest = self._held.lstrip()
        if marker and rest.startswith(marker):
            self._held = rest[len(marker) :]
            return bool(self._held)
        if not rest or (marker and marker.startswith(rest)):
            return False
        if rest[0] == "{" or (rest[0] == "[" and self._format == "plain"):
            self._state = self._open
            return True
        self._state = self._pass
        return True

    def _open(self) -> bool:
        """Before a call, a list of them, or (mistral) a bare name."""
        rest = self._held.lstrip()
        if not rest:
            return False
        if rest[0] == "[" and not self._is_listed and self._format in ("mistral", "plain"):
            self._is_listed, self._held = True, rest[1:]
            return True
        if rest[0] == "{":
            self._raw, self._held = "", rest
            self._reader = CallReader()
            self._state = self._read
            return True
        if self._format == "mistral" and not self._is_listed:
            return self._read_name(rest)
        self._give_up(MARKERS["hermes"][0] if self._format == "hermes" else "")
        return True

    def _read_name(self, rest: str) -> bool:
        """`name[ARGS]{…}`: the arguments alone are JSON."""
        at = rest.find("{")
        if at < 0:
            return False
        name = rest[:at].removesuffix("[ARGS]").strip()
        if name not in self._names:
            self._give_up("")
            return True
        self._reader, self._held, self._raw = CallReader(name), rest[at:], ""
        self._state = self._read
        return True

    def _read(self) -> bool:
        """Inside a call."""
        reader = self._reader
        assert reader is not None
        size = reader.push(self._held)
        self._raw += self._held[:size]
        self._held = self._held[size:]
        if reader.is_broken and not reader.is_told:
            self._give_up(self._raw)
            return True
        if self._is_certain():
            self._tell(reader)
        if reader.is_done or reader.is_broken:
            if not self._is_certain():
                self._give_up(self._raw)
                return True
            self._reader = None
            self._state = self._after
            self.is_finished = not self._parallel
        return bool(self._held)

    def _after(self) -> bool:
        """Behind a call: the end of its notation, or the next one."""
        closing = MARKERS["hermes"][1] if self._format == "hermes" else "]" if self._is_listed else ""
        rest = self._held.lstrip()
        if closing and rest.startswith(closing):
            self._held = rest[len(closing) :]
            self._state = self._skip if self._is_listed else self._find_marker
            return True
        if not rest or closing.startswith(rest):
            return False
        if self._format != "hermes" and rest[0] in ",;{":
            self._held = rest if rest[0] == "{" else rest[1:]
            self._state = self._open
            return True
        self._state = self._find_marker if self._format in ("hermes", "mistral") else self._pass
        return True

    def _skip(self) -> bool:
        """Behind the last call: white space is none of the answer."""
        if self._held.isspace():
            return False
        self._state = self._find_marker if self._format == "mistral" else self._pass
        self._is_listed = False
        return True

    def _pass(self) -> bool:
        """Text to the end."""
        self._text.append(self._held)
        self._held = ""
        return False

    # ---- what was found ----------------------------------------------------------------------------------------------

    def _is_certain(self) -> bool:
        """Whether what is read is a call: a marker says so, or the name of a tool."""
        reader = self._reader
        return (
            reader is not None
            and reader.name is not None
            and (self._format in ("hermes", "mistral") or reader.name in self._names)
        )

    def _tell(self, reader: CallReader) -> None:
        arguments = reader.take()
        if not reader.is_told:
            reader.is_told = True
            self._count += 1
            self._calls.append(ToolCallDelta(self._count - 1, arguments, new_id("call"), reader.name))
        elif arguments:
            self._calls.append(ToolCallDelta(self._count - 1, arguments))

    def _give_up(self, raw: str) -> None:
        """It was no call: text, with what had been read of it."""
        listed = "[" if self._is_listed and not self._count and self._format == "plain" else ""
        self._text.append(listed + raw)
        self._reader = None
        self._state = self._find_marker if self._format in ("hermes", "mistral") else self._pass
