"""Constraints: what a mask lets through obeys, what obeys is let through, and hostile texts end soon and clearly."""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sihe.serving.engine.grammar import MAX_SOURCE, Grammar, GrammarCompiler
from sihe.serving.engine.types import Constraint, ConstraintKind
from sihe.serving.errors import BadConstraint
from support.tiny_models import tiny_tokenizer

VOCABULARY = 320  # of the model: larger than the tokenizer's, as padded output layers are
EOS = 1
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "bc", "你"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@cache
def shared_compiler() -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), vocab_size=VOCABULARY, stop_ids=[EOS])


@pytest.fixture
def compiler() -> GrammarCompiler:
    return shared_compiler()


def allowed(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def walk(grammar: Grammar, source: random.Random, limit: int = 400) -> list[int]:
    """Random tokens that the masks allow, to the end."""
    tokens: list[int] = []
    while not grammar.is_complete:
        token = source.choice(sorted(allowed(grammar.mask())))
        if token == EOS:
            assert grammar.is_satisfied
            return tokens
        tokens.append(token)
        grammar.accept(token)
        assert len(tokens) < limit
    return tokens


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_masks_allow_obeys_the_schema(compiler: GrammarCompiler, seed: int) -> None:
    grammar = compiler.start(Constraint("json_schema", json.dumps(SCHEMA)))
    tokens: list[int] = []
    source = random.Random(seed)
    while not grammar.is_complete and len(tokens) < 2000:
        token = source.choice(sorted(allowed(grammar.mask())))
        if token == EOS:
            break
        grammar.accept(token)
        tokens.append(token)
    Draft202012Validator(SCHEMA).validate(json.loads(tiny_tokenizer().decode(tokens)))


names = st.text(st.characters(codec="utf-8", exclude_characters='"\\', exclude_categories=["Cc", "Cs"]), max_size=6)


@given(st.fixed_dictionaries({"name": names, "age": st.integers(0, 150), "kind": st.sampled_from(["a", "bc", "你"])}))
def test_what_obeys_the_schema_is_let_through(value: dict[str, object]) -> None:
    grammar = shared_compiler().start(Constraint("json_schema", json.dumps(SCHEMA)))
    text = json.dumps({key: value[key] for key in SCHEMA["required"]}, ensure_ascii=False)  # in the schema's order
    for token in tiny_tokenizer().encode(text).ids:
        assert token in allowed(grammar.mask())
        grammar.accept(token)
    assert grammar.is_complete


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("kind", "source", "check"),
    [
        ("regex", "[a-c]{2,5}(x|yz)", lambda text: re.fullmatch("[a-c]{2,5}(x|yz)", text)),
        (
            "choice",
            '["yes", "no", "no way", "\\"q\\"\\n", "你好"]',
            lambda text: text in ("yes", "no", "no way", '"q"\n', "你好"),
        ),
        ("grammar", 'start: "(" start ")" | /[0-9]{1,3}/', lambda text: text.strip("()").isdigit()),
    ],
)
def test_other_kinds(compiler: GrammarCompiler, kind: ConstraintKind, source: str, check: object, seed: int) -> None:
    tokens = walk(compiler.start(Constraint(kind, source)), random.Random(seed))
    assert check(tiny_tokenizer().decode(tokens))  # type: ignore[operator]


def test_white_space_does_not_go_on_for_ever(compiler: GrammarCompiler) -> None:
    grammar = compiler.start(Constraint("json_object", ""))
    grammar.accept(tiny_tokenizer().encode("{").ids[0])
    (space,) = tiny_tokenizer().encode(" ").ids
    count = 0
    while space in allowed(grammar.mask()):
        grammar.accept(space)
        count += 1
        assert count <= 20
    assert count >= 12  # enough to indent


def test_any_object_is_an_object(compiler: GrammarCompiler) -> None:
    grammar = compiler.start(Constraint("json_object", ""))
    for token in tiny_tokenizer().encode('{"a": [1, {"b": null}]}').ids:
        grammar.accept(token)
    assert grammar.is_complete
    with pytest.raises(BadConstraint):
        compiler.start(Constraint("json_object", "")).accept(tiny_tokenizer().encode("[").ids[0])


@given(st.data())
def test_drafts_are_masked_as_if_they_came_and_leave_no_trace(data: st.DataObject) -> None:
    grammar = shared_compiler().start(Constraint("regex", "(ab|cd){1,4}"))
    text = data.draw(st.text("abcdx", max_size=8))
    drafted = tiny_tokenizer().encode(text).ids if text else []
    before = allowed(grammar.mask())
    masks = grammar.masks(drafted)
    assert len(masks) == len(drafted) + 1
    assert allowed(grammar.mask()) == before
    for token, mask in zip(drafted, masks, strict=False):
        assert allowed(mask) == allowed(grammar.mask())
        if token not in allowed(mask):
            return
        grammar.accept(token)
    assert allowed(masks[-1]) == allowed(grammar.mask())


def test_a_rollback_goes_back(compiler: GrammarCompiler) -> None:
    grammar = compiler.start(Constraint("regex", "ab"))
    first = allowed(grammar.mask())
    for token in tiny_tokenizer().encode("ab").ids:
        grammar.accept(token)
    assert grammar.is_complete
    grammar.rollback(len(tiny_tokenizer().encode("ab").ids))
    assert not grammar.is_complete
    assert allowed(grammar.mask()) == first


HOSTILE: list[tuple[ConstraintKind, str, str]] = [
    ("json_schema", "{", "JSON"),
    ("json_schema", "[1]", "object"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "minimum"),
    ("json_schema", '{"allOf": [{"type": "string"}, {"type": "integer"}]}', "ncompatible"),
    ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
    ("json_schema", '{"$ref": "http://127.0.0.1:1/schema.json"}', "not present"),
    ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "no answer"),
    ("json_schema", '{"properties": {"a": ' * 300 + "{}" + "}}" * 300, "recursion"),
    ("json_schema", '{"enum": [' + '"x", ' * 20_000 + '"y"]}', "bytes"),
    (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"required": [f"a{at}"]}, {"required": [f"b{at}"]}]} for at in range(20)]}),
        "too large",
    ),
    ("regex", "(a", "unclosed"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", r"[^\s\S]", "no answer"),
    ("regex", "a" * 20_000, "bytes"),
    ("grammar", "start: foo", "foo"),
    ("grammar", 'start: start "a"', "no answer"),
    ("grammar", "", "Empty"),
    ("grammar", "start: " + '"x" ' * 20_000, "bytes"),
    ("choice", "[]", "1 to 1024"),
    ("choice", '["a", ""]', "not empty"),
    ("choice", '["a", 3]', "not empty"),
    ("choice", "{", "JSON"),
]


@pytest.mark.parametrize(("kind", "source", "expected"), HOSTILE)
def test_what_cannot_be_used_is_said(
    compiler: GrammarCompiler, kind: ConstraintKind, source: str, expected: str
) -> None:
    with pytest.raises(BadConstraint, match=expected) as caught:
        compiler.start(Constraint(kind, source))
    assert caught.value.kind == kind
    assert len(str(caught.value)) < 450


EXPLOSIVE: list[tuple[ConstraintKind, str]] = [
    ("regex", "(a|b)*a(a|b){300}"),
    ("regex", "((a{1,100}){1,100}){1,100}"),
    ("regex", "(a?){500}a{500}"),
    ("grammar", 'start: e\ne: e e e e | e e e | e e | "a"'),
    ("json_schema", '{"type": "string", "pattern": "^(a|b)*a(a|b){200}$"}'),
]


@pytest.mark.parametrize(("kind", "source"), EXPLOSIVE)
def test_what_explodes_is_bounded_and_fails_alone(compiler: GrammarCompiler, kind: ConstraintKind, source: str) -> None:
    """Some are no trouble, some are given up: either way each step ends, and the compiler serves others."""
    ids = {tiny_tokenizer().token_to_id(letter) for letter in "ab"}
    source_of_chance = random.Random(3)
    with contextlib.suppress(BadConstraint):
        grammar = compiler.start(Constraint(kind, source))
        if kind == "json_schema":
            grammar.accept(tiny_tokenizer().token_to_id('"'))
        for _ in range(60):
            choices = sorted(allowed(grammar.mask()) & {id for id in ids if id is not None})
            if not choices:
                break
            grammar.accept(source_of_chance.choice(choices))
    assert compiler.start(Constraint("regex", "ab")).mask().any()


def test_equal_constraints_are_compiled_once_and_kept_apart(compiler: GrammarCompiler) -> None:
    constraint = Constraint("regex", "xyz|xya")
    first, second = compiler.start(constraint), compiler.start(constraint)
    for token in tiny_tokenizer().encode("xyz").ids:
        first.accept(token)
    assert first.is_complete
    assert not second.is_complete
    assert len(compiler._compiled) <= 64


def test_old_constraints_make_room(compiler: GrammarCompiler) -> None:
    for at in range(70):
        compiler.start(Constraint("regex", f"n{at}"))
    assert len(compiler._compiled) == 64
    assert Constraint("regex", "n0") not in compiler._compiled


def test_many_threads_compile_at_once() -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), vocab_size=VOCABULARY, stop_ids=[EOS])
    found: list[bool] = []

    def work(at: int) -> None:
        found.append(compiler.start(Constraint("regex", f"[a-z]{{{at % 3 + 1}}}")).mask().any())

    threads = [threading.Thread(target=work, args=(at,)) for at in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12


def test_a_model_without_an_end_can_be_constrained() -> None:
    compiler = GrammarCompiler(tiny_tokenizer(), vocab_size=VOCABULARY, stop_ids=[])
    assert tiny_tokenizer().decode(walk(compiler.start(Constraint("choice", '["fox"]')), random.Random(1))) == "fox"


def test_every_kind_has_a_limit() -> None:
    assert set(MAX_SOURCE) == set(ConstraintKind.__args__)  # type: ignore[attr-defined]
