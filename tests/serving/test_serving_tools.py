"""Tools and calls of them: as values, in each family's notation, and out of a stream cut anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import InvalidInput
from sihe.serving.engine.tools import Tool, ToolCall, ToolCallDelta, join_deltas, whole_calls
from sihe.serving.engine.types import ChatMessage, Constraint, GenerationRequest

HELLO = (ChatMessage("user", "hello"),)


def tool(name: str = "look_up", **parameters: object) -> Tool:
    schema = {"type": "object", "properties": parameters, "required": list(parameters), "additionalProperties": False}
    return Tool({"type": "function", "function": {"name": name, "parameters": schema}})


@pytest.mark.parametrize(
    ("definition", "expected"),
    [
        ({"type": "retrieval"}, "'retrieval'"),
        ({"type": "function"}, "'function'"),
        ({"type": "function", "function": {"name": "a b"}}, "'a b'"),
        ({"type": "function", "function": {"name": "x" * 65}}, "1 to 64"),
        ({"type": "function", "function": {"name": "f", "parameters": []}}, "JSON schema"),
    ],
)
def test_a_tool_is_checked_when_made(definition: dict[str, object], expected: str) -> None:
    with pytest.raises(InvalidInput, match=expected):
        Tool(definition)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": (tool(), tool())}, "same name"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": (tool(),), "tool_choice": "required", "forced_tool": "absent"}, "'absent'"),
        ({"tools": tuple(tool(f"t{at}") for at in range(129))}, "at most 128"),
        ({"tools": (tool(),), "tool_choice": "required", "constraint": Constraint("regex", "a")}, "both"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, object], expected: str) -> None:
    with pytest.raises(InvalidInput, match=expected):
        GenerationRequest(messages=HELLO, **fields)  # type: ignore[arg-type]


def test_tools_need_a_conversation() -> None:
    with pytest.raises(InvalidInput, match="conversation"):
        GenerationRequest(prompt="x", tools=(tool(),))


@given(st.lists(st.text(max_size=6), min_size=1, max_size=5), st.data())
def test_pieces_of_calls_join_to_the_calls(arguments: list[str], data: st.DataObject) -> None:
    calls = tuple(ToolCall(f"call_{at}", f"tool_{at}", text) for at, text in enumerate(arguments))
    pieces: list[ToolCallDelta] = []
    for at, call in enumerate(calls):
        cut = data.draw(st.integers(0, len(call.arguments)))
        pieces += [
            ToolCallDelta(at, "", call.id, call.name),
            ToolCallDelta(at, call.arguments[:cut]),
            ToolCallDelta(at, call.arguments[cut:]),
        ]
    assert whole_calls(pieces) == calls
    middle = data.draw(st.integers(0, len(pieces)))
    assert whole_calls(_joined(pieces, middle)) == calls


def _joined(pieces: Sequence[ToolCallDelta], middle: int) -> list[ToolCallDelta]:
    return [*join_deltas(pieces[:middle]), *join_deltas(pieces[middle:])]
