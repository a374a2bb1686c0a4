"""Grades: the same in every unit, never better for a worse guess."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.apps.coach.errors import LabParameterInvalid
from sihe.apps.coach.labs.grading import SAME_ORDER, grade, verdict
from sihe.apps.coach.labs.registry import lab
from sihe.apps.coach.labs.types import quantity

sizes = st.floats(1e-6, 1e6)
tolerances = st.floats(0.01, 0.5)
RANK = {"close": 0, "order": 1, "off": 2}


@pytest.mark.parametrize(
    ("predicted", "actual", "expected"),
    [
        (10.0, 10.0, "close"),
        (10.9, 10.0, "close"),
        (11.1, 10.0, "order"),
        (30.0, 10.0, "order"),
        (33.0, 10.0, "off"),
        (3.2, 10.0, "order"),
        (3.1, 10.0, "off"),
        (-10.0, 10.0, "off"),
        (0.0, 0.0, "close"),
        (0.1, 0.0, "off"),
        (0.0, 0.1, "off"),
        (-2.0, -2.1, "close"),
    ],
)
def test_verdicts(predicted: float, actual: float, expected: str) -> None:
    assert verdict(predicted, actual, 0.1) == expected


@given(actual=sizes, factor=st.floats(1e-3, 1e3), tolerance=tolerances, scale=st.floats(1e-3, 1e3))
def test_the_unit_does_not_matter(actual: float, factor: float, tolerance: float, scale: float) -> None:
    distance = abs(math.log(factor))
    edges = (math.log1p(tolerance), math.log(SAME_ORDER))
    if min(abs(distance - edge) for edge in edges) > 1e-9:  # on an edge the last bit decides
        assert verdict(actual * factor, actual, tolerance) == verdict(
            actual * factor * scale, actual * scale, tolerance
        )


@given(actual=sizes, near=st.floats(1, 100), further=st.floats(1, 100), tolerance=tolerances)
def test_further_is_never_better(actual: float, near: float, further: float, tolerance: float) -> None:
    first, second = verdict(actual * near, actual, tolerance), verdict(actual * near * further, actual, tolerance)
    assert RANK[first] <= RANK[second]


@given(actual=sizes, factor=st.floats(1.001, 100), tolerance=tolerances)
def test_too_much_and_too_little_by_the_same_factor_are_equal(actual: float, factor: float, tolerance: float) -> None:
    edges = (math.log1p(tolerance), math.log(SAME_ORDER))
    if min(abs(math.log(factor) - edge) for edge in edges) > 1e-9:
        assert verdict(actual * factor, actual, tolerance) == verdict(actual / factor, actual, tolerance)


def test_a_grade_carries_ratio_and_error() -> None:
    given_ = grade(lab("zero.memory").claim("stage1-measured"), 8.0, 10.0)
    assert (given_.ratio, given_.absolute_error, given_.verdict, given_.unit) == (0.8, 2.0, "order", "B/param")


def test_what_is_not_a_prediction_is_refused() -> None:
    zero = lab("zero.memory")
    with pytest.raises(LabParameterInvalid, match="finite number of B/param, got nan"):
        grade(zero.claim("stage1-measured"), math.nan, 10.0)
    with pytest.raises(LabParameterInvalid, match="not one to predict"):
        grade(zero.claim("stage0-modelled"), 16.0, 16.0)
    with pytest.raises(LabParameterInvalid, match="has no claim 'phlogiston'"):
        zero.claim("phlogiston")


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1.5, "", "1.50"),
        (31.4, "GB", "31.4 GB"),
        (16384.0, "B", "16,384 B"),
        (0.0, "ms", "0 ms"),
        (2.5e-7, "", "2.50e-07"),
    ],
)
def test_quantities_keep_their_significant_digits(value: float, unit: str, shown: str) -> None:
    assert quantity(value, unit) == shown


@pytest.mark.parametrize(
    ("given_", "complaint"),
    [
        ({"ranks": 3}, "'ranks' takes one of 2, 4, got 3"),
        ({"ranks": "two"}, "got 'two'"),
        ({"ranks": True}, "got True"),
        ({"hidden": 64.5}, "got 64.5"),
        ({"phlogiston": 1}, "no parameter 'phlogiston'"),
    ],
)
def test_parameters_are_checked(given_: dict[str, object], complaint: str) -> None:
    with pytest.raises(LabParameterInvalid, match=complaint):
        lab("zero.memory").resolve(given_)


def test_parameters_come_typed_and_complete() -> None:
    assert lab("zero.memory").resolve({"ranks": "4"}) == {"ranks": 4, "hidden": 256, "blocks": 4}
