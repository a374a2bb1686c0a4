"""Filters over payloads: a small typed language, pure functions, no query text to escape.

    {"field": "lang", "equals": "zh"}                       the value, or one element of a list, equals it
    {"field": "lang", "in": ["zh", "en"]}                   … is one of these
    {"field": "meta.year", "range": {"gte": 2020, "lt": 2024}}   gt, gte, lt, lte; numbers, or texts such as ISO dates
    {"and": [ … ]}   {"or": [ … ]}   {"not": { … }}

A dot leads into nested objects. A field that is missing satisfies no condition. Types are strict: `true` is not `1`,
`"1"` is not `1`, and `1` equals `1.0`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sihe.vectors.errors import InvalidFilter

Scalar: TypeAlias = str | int | float | bool
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Equals:
    """The field's value, or an element of it when it is a list, equals `value`."""

    field: str
    value: Scalar


@dataclass(frozen=True, slots=True)
class In:
    """The field's value, or an element of it when it is a list, is one of `values`."""

    field: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """The field's value, or an element of it when it is a list, lies within all given bounds."""

    field: str
    gt: float | str | None = None
    gte: float | str | None = None
    lt: float | str | None = None
    lte: float | str | None = None


@dataclass(frozen=True, slots=True)
class And:
    """Every part holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """At least one part holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The part does not hold."""

    part: Filter


Filter: TypeAlias = Equals | In | Range | And | Or | Not


def matches(condition: Filter, payload: Mapping[str, Any]) -> bool:
    """Whether `payload` satisfies `condition`."""
    match condition:
        case And(parts):
            return all(matches(part, payload) for part in parts)
        case Or(parts):
            return any(matches(part, payload) for part in parts)
        case Not(part):
            return not matches(part, payload)
        case Equals(field, value):
            return _any(payload, field, lambda found: _same(found, value))
        case In(field, values):
            return _any(payload, field, lambda found: any(_same(found, value) for value in values))
        case Range():
            return _any(payload, condition.field, lambda found: _within(found, condition))


def parse_filter(value: Any, *, where: str = "filter") -> Filter:
    """The filter that JSON describes. Raises `InvalidFilter` that names the place, as `filter.and[1].range`."""
    return _parse(value, where, 0)


def _parse(value: Any, where: str, depth: int) -> Filter:
    if depth > _MAX_DEPTH:
        raise InvalidFilter(where, f"filters nest at most {_MAX_DEPTH} levels deep")
    if not isinstance(value, Mapping):
        raise InvalidFilter(where, f"expected an object, got {value!r}")
    keys = set(value)
    if keys in ({"and"}, {"or"}):
        (key,) = keys
        parts = value[key]
        if not isinstance(parts, list) or not parts:
            raise InvalidFilter(f"{where}.{key}", f"expected a list of at least one filter, got {parts!r}")
        parsed = tuple(_parse(part, f"{where}.{key}[{index}]", depth + 1) for index, part in enumerate(parts))
        return And(parsed) if key == "and" else Or(parsed)
    if keys == {"not"}:
        return Not(_parse(value["not"], f"{where}.not", depth + 1))
    if len(keys) == 2 and "field" in keys and keys & {"equals", "in", "range"}:
        return _parse_condition(value, where)
    raise InvalidFilter(
        where, f"expected and, or, not, or field with one of equals, in, range; got the keys {sorted(map(str, keys))}"
    )


def _parse_condition(value: Mapping[str, Any], where: str) -> Filter:
    field = value["field"]
    if not isinstance(field, str) or not field:
        raise InvalidFilter(f"{where}.field", f"expected the name of a field, got {field!r}")
    if "equals" in value:
        return Equals(field, _scalar(value["equals"], f"{where}.equals"))
    if "in" in value:
        values = value["in"]
        if not isinstance(values, list):
            raise InvalidFilter(f"{where}.in", f"expected a list of values, got {values!r}")
        return In(field, tuple(_scalar(item, f"{where}.in[{index}]") for index, item in enumerate(values)))
    return _parse_range(field, value["range"], f"{where}.range")


def _parse_range(field: str, bounds: Any, where: str) -> Range:
    if not isinstance(bounds, Mapping) or not bounds or not set(bounds) <= {"gt", "gte", "lt", "lte"}:
        raise InvalidFilter(where, f"expected an object with gt, gte, lt or lte, got {bounds!r}")
    for key, bound in bounds.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float | str):
            raise InvalidFilter(f"{where}.{key}", f"expected a number or a text, got {bound!r}")
        _scalar(bound, f"{where}.{key}")
    if len({isinstance(bound, str) for bound in bounds.values()}) > 1:
        raise InvalidFilter(where, f"expected bounds of one kind, numbers or texts, got {dict(bounds)!r}")
    return Range(field, **bounds)


def _scalar(value: Any, where: str) -> Scalar:
    if not isinstance(value, str | int | float | bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidFilter(where, f"expected a text, a number or a boolean, got {value!r}")
    return value


def _any(payload: Mapping[str, Any], field: str, holds: Callable[[Any], bool]) -> bool:
    found = _lookup(payload, field)
    return any(map(holds, found)) if isinstance(found, list) else holds(found)


def _lookup(payload: Mapping[str, Any], field: str) -> Any:
    """The value at a dotted path; a key that itself contains the dots comes first. None when there is none."""
    if field in payload:
        return payload[field]
    head, dot, rest = field.partition(".")
    inner = payload.get(head)
    return _lookup(inner, rest) if dot and isinstance(inner, Mapping) else None


def _same(found: Any, value: Scalar) -> bool:
    if isinstance(found, bool) or isinstance(value, bool):
        return found is value
    if isinstance(value, str) or isinstance(found, str):
        return isinstance(found, str) and isinstance(value, str) and found == value
    return isinstance(found, int | float) and found == value


def _within(found: Any, bounds: Range) -> bool:
    comparisons = (
        (bounds.gt, operator.gt),
        (bounds.gte, operator.ge),
        (bounds.lt, operator.lt),
        (bounds.lte, operator.le),
    )
    return all(_comparable(found, bound) and holds(found, bound) for bound, holds in comparisons if bound is not None)


def _comparable(found: Any, bound: float | str) -> bool:
    return not isinstance(found, bool) and isinstance(found, str if isinstance(bound, str) else int | float)
