"""The filter language against plain Python, and its errors."""

from __future__ import annotations

from typing import Any

import pytest

from sihe.vectors.errors import InvalidFilter
from sihe.vectors.filter import And, Equals, In, Not, Or, Range, matches, parse_filter

PAYLOAD = {
    "lang": "zh",
    "year": 2024,
    "score": 0.5,
    "ok": True,
    "tags": ["a", 3],
    "meta": {"when": "2024-05-01", "deep": {"n": 1}},
    "dotted.key": 1,
    "none": None,
}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"field": "lang", "equals": "zh"}, True),
        ({"field": "lang", "equals": "en"}, False),
        ({"field": "year", "equals": 2024.0}, True),
        ({"field": "year", "equals": "2024"}, False),
        ({"field": "ok", "equals": True}, True),
        ({"field": "ok", "equals": 1}, False),
        ({"field": "meta.deep.n", "equals": True}, False),
        ({"field": "meta.deep.n", "equals": 1}, True),
        ({"field": "dotted.key", "equals": 1}, True),
        ({"field": "tags", "equals": "a"}, True),
        ({"field": "tags", "in": ["b", 3]}, True),
        ({"field": "tags", "in": []}, False),
        ({"field": "missing", "equals": "x"}, False),
        ({"field": "lang.deeper", "equals": "x"}, False),
        ({"field": "none", "range": {"gte": 0}}, False),
        ({"field": "year", "range": {"gte": 2024, "lt": 2025}}, True),
        ({"field": "year", "range": {"gt": 2024}}, False),
        ({"field": "year", "range": {"lte": "z"}}, False),
        ({"field": "ok", "range": {"gte": 0}}, False),
        ({"field": "tags", "range": {"gte": 3}}, True),
        ({"field": "meta.when", "range": {"gte": "2024-01-01", "lt": "2025"}}, True),
        ({"not": {"field": "missing", "equals": "x"}}, True),
        ({"and": [{"field": "lang", "equals": "zh"}, {"field": "year", "range": {"lt": 0}}]}, False),
        ({"or": [{"field": "lang", "equals": "en"}, {"field": "score", "range": {"lte": 0.5}}]}, True),
    ],
)
def test_matches(condition: dict[str, Any], expected: bool) -> None:
    assert matches(parse_filter(condition), PAYLOAD) is expected


def test_parse_gives_values() -> None:
    parsed = parse_filter(
        {
            "and": [
                {"field": "a", "in": [1, "x"]},
                {"or": [{"field": "b", "range": {"gt": 1}}]},
                {"not": {"field": "c", "equals": False}},
            ]
        }
    )
    assert parsed == And((In("a", (1, "x")), Or((Range("b", gt=1),)), Not(Equals("c", False))))


def _nested(depth: int) -> dict[str, Any]:
    return {"not": _nested(depth - 1)} if depth else {"field": "a", "equals": 1}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ([], "filter: expected an object, got \\[\\]"),
        ({}, "filter: expected and, or, not"),
        ({"field": "a"}, r"got the keys \['field'\]"),
        ({"field": "a", "equals": 1, "in": [1]}, "filter: expected and, or, not"),
        ({"field": 3, "equals": 1}, r"filter\.field: expected the name"),
        ({"field": "a", "equals": None}, r"filter\.equals: expected a text"),
        ({"field": "a", "equals": float("nan")}, r"filter\.equals"),
        ({"field": "a", "in": "x"}, r"filter\.in: expected a list"),
        ({"field": "a", "in": [[1]]}, r"filter\.in\[0\]"),
        ({"field": "a", "range": {}}, r"filter\.range: expected an object with gt"),
        ({"field": "a", "range": {"above": 1}}, "gt, gte, lt or lte"),
        ({"field": "a", "range": {"gt": True}}, r"filter\.range\.gt"),
        ({"field": "a", "range": {"gt": 1, "lt": "b"}}, "bounds of one kind"),
        ({"and": []}, r"filter\.and: expected a list of at least one"),
        ({"or": [{"field": "a", "equals": 1}, {"not": 3}]}, r"filter\.or\[1\]\.not: expected an object, got 3"),
        (_nested(40), "at most 32 levels"),
    ],
)
def test_what_cannot_be_read_is_named(condition: Any, message: str) -> None:
    with pytest.raises(InvalidFilter, match=message):
        parse_filter(condition)
