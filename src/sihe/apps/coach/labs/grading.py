"""How near a prediction came. Pure.

A verdict depends on the ratio alone, so that it does not change with the unit: `close` within the claim's tolerance,
`order` within half an order of magnitude either way, `off` beyond it.
"""

from __future__ import annotations

import math

from sihe.apps.coach.errors import LabParameterInvalid
from sihe.apps.coach.labs.types import ClaimSpec, Grade, Verdict

SAME_ORDER = math.sqrt(10.0)


def verdict(predicted: float, actual: float, tolerance: float) -> Verdict:
    """`close`, `order` or `off`. A value of 0 is close to 0 alone; a wrong sign is off."""
    if predicted == actual:
        return "close"
    if actual == 0 or predicted == 0 or (predicted > 0) != (actual > 0):
        return "off"
    distance = abs(math.log(abs(predicted)) - math.log(abs(actual)))
    if distance <= math.log1p(tolerance):
        return "close"
    return "order" if distance <= math.log(SAME_ORDER) else "off"


def grade(claim: ClaimSpec, predicted: float, actual: float) -> Grade:
    """A prediction set beside the value that came out. Raises `LabParameterInvalid` for one that is not finite."""
    check_prediction(claim, predicted)
    return Grade(
        claim=claim.key,
        predicted=predicted,
        actual=actual,
        unit=claim.unit,
        ratio=predicted / actual if actual != 0 else None,
        absolute_error=abs(predicted - actual),
        verdict=verdict(predicted, actual, claim.tolerance),
    )


def check_prediction(claim: ClaimSpec, value: float) -> None:
    """Raises `LabParameterInvalid` unless `value` is finite and the claim is one to predict."""
    if claim.ask is None:
        raise LabParameterInvalid(f"claim {claim.key!r} is not one to predict")
    if not math.isfinite(value):
        raise LabParameterInvalid(f"a prediction is a finite number of {claim.unit or 'no unit'}, got {value!r}")
