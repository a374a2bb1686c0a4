"""Tools and calls of them: as values, in each family's notation, and out of a stream cut anywhere."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import InvalidInput
from sihe.serving.engine.grammar import GrammarCompiler
from sihe.serving.engine.tool_calls import ToolCallParser, ToolFormat, detect_format, enforce
from sihe.serving.engine.tools import Tool, ToolCall, ToolCallDelta, join_deltas, whole_calls
from sihe.serving.engine.types import ChatMessage, Constraint, GenerationRequest
from support.tiny_models import tiny_tokenizer

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


# ---- notations -------------------------------------------------------------------------------------------------------

Expected = tuple[str, list[tuple[str, str]]]
NAMES = ("look_up", "add")
ANSWERS: list[tuple[ToolFormat, str, Expected]] = [
    (
        "hermes",
        'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"x": "北京", "n": [1, {"a": "}"}]}}</tool_call>\n',
        ("Let me see.", [("add", '{"x": "北京", "n": [1, {"a": "}"}]}')]),
    ),
    (
        "hermes",
        '<tool_call>\n{"name": "look_up", "arguments": {}}</tool_call>\n<tool_call>{"arguments":{"x": 1},"name":"add"}',
        ("", [("look_up", "{}"), ("add", '{"x": 1}')]),
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', ("", [("add", "{}")])),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"x\\": 2}"}</tool_call>', ("", [("add", '{"x": 2}')])),
    ("hermes", "a < b and <tool_box> and {", ("a < b and <tool_box> and {", [])),
    ("hermes", "<tool_call>none</tool_call>", ("<tool_call>none</tool_call>", [])),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "look_up", "arguments": {"q": "a]b\\""}}, {"name": "add", "arguments": {"x": 1}}]',
        ("", [("look_up", '{"q": "a]b\\""}'), ("add", '{"x": 1}')]),
    ),
    ("mistral", '[TOOL_CALLS]look_up[ARGS]{"q": 1}', ("", [("look_up", '{"q": 1}')])),
    ("mistral", '[TOOL_CALLS]look_up{"q": 1}[TOOL_CALLS]add{}', ("", [("look_up", '{"q": 1}'), ("add", "{}")])),
    ("mistral", "Just [text] and [TOOL", ("Just [text] and [TOOL", [])),
    ("llama3", '{"name": "add", "parameters": {"x": 1.5}}', ("", [("add", '{"x": 1.5}')])),
    (
        "llama3",
        '<|python_tag|>{"type": "function", "name": "add", "parameters": {"x": 1}}; {"name": "look_up"}',
        ("", [("add", '{"x": 1}'), ("look_up", "{}")]),
    ),
    ("llama3", '{"answer": {"name": "add"}}', ('{"answer": {"name": "add"}}', [])),
    ("llama3", '{"name": "Ada", "age": 36}', ('{"name": "Ada", "age": 36}', [])),
    ("llama3", "It is 3.", ("It is 3.", [])),
    (
        "plain",
        '[{"name": "add", "arguments": {"x": 1}}, {"name": "add", "arguments": {}}]',
        ("", [("add", '{"x": 1}'), ("add", "{}")]),
    ),
    ("plain", '[1, {"name": "add"}]', ('[1, {"name": "add"}]', [])),
    ("plain", "Hello [there]", ("Hello [there]", [])),
]


def parse_pieces(format: ToolFormat, pieces: Sequence[str]) -> Expected:
    parser = ToolCallParser(format, NAMES)
    text, deltas = "", []
    for piece in [*pieces, None]:
        parsed = parser.flush() if piece is None else parser.push(piece)
        text += parsed.text
        deltas += parsed.calls
    calls = whole_calls(deltas)
    assert parser.has_calls == bool(calls)
    assert len({call.id for call in calls}) == len(calls)
    assert all(delta.id is not None for delta in deltas if delta.name is not None)
    return text, [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize(("format", "answer", "expected"), ANSWERS)
def test_calls_are_found_wherever_the_stream_is_cut(format: ToolFormat, answer: str, expected: Expected) -> None:
    assert parse_pieces(format, [answer]) == expected
    assert parse_pieces(format, list(answer)) == expected
    for at in range(len(answer)):
        assert parse_pieces(format, [answer[:at], answer[at:]]) == expected


@given(st.sampled_from(ANSWERS), st.data())
def test_an_answer_that_breaks_off_says_the_same_however_it_came(
    case: tuple[ToolFormat, str, Expected], data: st.DataObject
) -> None:
    format, answer, _ = case
    broken = answer[: data.draw(st.integers(0, len(answer)))]
    assert parse_pieces(format, [broken]) == parse_pieces(format, list(broken))


@given(
    st.sampled_from(["hermes", "mistral", "llama3", "plain"]),
    st.text('{}[]":,\\ anmedrgutslook_up<>/TOOL_CALLS|1', max_size=40),
)
def test_no_text_breaks_the_parser(format: ToolFormat, text: str) -> None:
    assert parse_pieces(format, [text]) == parse_pieces(format, list(text))


def test_arguments_are_handed_out_before_the_call_ends() -> None:
    parser = ToolCallParser("hermes", NAMES)
    begun = parser.push('<tool_call>{"name": "add", "arguments": {"x": 12')
    assert [(call.name, call.arguments) for call in begun.calls] == [("add", '{"x": 12')]
    assert [(call.name, call.arguments) for call in parser.push("34").calls] == [(None, "34")]


def test_one_call_is_enough_where_no_more_are_wanted() -> None:
    parser = ToolCallParser("hermes", NAMES, parallel=False)
    parser.push('<tool_call>{"name": "add", "arguments": {}')
    assert not parser.is_finished
    parser.push("}")
    assert parser.is_finished


@pytest.mark.parametrize(
    ("template", "format"),
    [
        ("{% if tools %}<tool_call>{{ x }}</tool_call>{% endif %}", "hermes"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<|python_tag|> Environment: ipython", "llama3"),
        ("{{ tools }}", "plain"),
    ],
)
def test_a_template_shows_its_notation(template: str, format: ToolFormat) -> None:
    assert detect_format(template) == format


# ---- enforced --------------------------------------------------------------------------------------------------------


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), vocab_size=320, stop_ids=[1])


REFERRING = Tool(
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "$defs": {"number": {"type": "integer", "minimum": 0, "maximum": 99}},
                "type": "object",
                "properties": {"x": {"$ref": "#/$defs/number"}},
                "required": ["x"],
                "additionalProperties": False,
            },
        },
    }
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("format", ["hermes", "mistral", "llama3", "plain"])
def test_an_enforced_answer_is_calls_that_obey_their_schemas(format: ToolFormat, parallel: bool, seed: int) -> None:
    tools = (tool("look_up", kind={"enum": ["a", "b"]}), REFERRING)
    request = GenerationRequest(messages=HELLO, tools=tools, tool_choice="required", parallel_tool_calls=parallel)
    special = {"[TOOL_CALLS]": 2}.get  # a special token of the vocabulary stands for it
    grammar = compiler().start(enforce(format, request, special))
    source = random.Random(seed)
    text = ""
    while not grammar.is_complete:
        bits = np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")).tolist()
        token = source.choice(bits)
        if token == 1:
            break
        grammar.accept(token)
        text += "[TOOL_CALLS]" if token == 2 else tiny_tokenizer().decode([token])
        assert len(text) < 20_000
    content, calls = parse_pieces(format, [text])
    assert content.strip() == ""
    assert 1 <= len(calls) <= (8 if parallel else 1)
    for name, arguments in calls:
        value = json.loads(arguments)
        if name == "look_up":
            assert value in ({"kind": "a"}, {"kind": "b"})
        else:
            assert set(value) == {"x"}
            assert 0 <= value["x"] <= 99


def test_a_named_tool_is_the_only_one() -> None:
    request = GenerationRequest(
        messages=HELLO, tools=(tool("look_up"), REFERRING), tool_choice="required", forced_tool="add"
    )
    source = enforce("hermes", request, {}.get).source
    assert "look_up" not in source
    assert '"add"' in source
