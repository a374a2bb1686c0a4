"""Tail probabilities of the normal, Student's t and chi-square distributions, from `math` alone.

The incomplete beta and gamma functions are computed by their continued fractions (Lentz's method as in Press et al.,
"Numerical Recipes", 3rd ed., sections 6.2 and 6.4), to about 1e-13.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

_TINY = 1e-300
_PRECISION = 1e-15
_TERMS = 10_000


def normal_two_sided(z: float) -> float:
    """P(|Z| ≥ |z|) of the standard normal distribution."""
    return math.erfc(abs(z) / math.sqrt(2))


def student_two_sided(t: float, freedom: float) -> float:
    """P(|T| ≥ |t|) of Student's t with `freedom` (> 0, need not be whole) degrees of freedom."""
    return beta_share(freedom / (freedom + t * t), freedom / 2, 0.5)


def chi_square_tail(x: float, freedom: float) -> float:
    """P(X ≥ x) of the chi-square distribution."""
    return 1.0 if x <= 0 else _gamma_tail(freedom / 2, x / 2)


def log_beta(a: float, b: float) -> float:
    """Natural log of the beta function."""
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def beta_share(x: float, a: float, b: float) -> float:
    """P(X ≤ x) of the Beta(a, b) distribution: the regularised incomplete beta function."""
    return math.exp(log_beta_share(x, a, b))


def log_beta_share(x: float, a: float, b: float) -> float:
    """Natural log of `beta_share`, exact also where the share itself is too small for a float."""
    if x <= 0:
        return -math.inf
    if x >= 1:
        return 0.0
    log_front = a * math.log(x) + b * math.log1p(-x) - log_beta(a, b)
    if x < (a + 1) / (a + b + 2):  # where the fraction converges fast; elsewhere by symmetry
        return min(0.0, log_front + math.log(_fraction(1.0, _beta_terms(x, a, b))) - math.log(a))
    other = math.exp(log_front + math.log(_fraction(1.0, _beta_terms(1 - x, b, a))) - math.log(b))
    return math.log1p(-min(other, 1.0)) if other < 1 else -math.inf


def _beta_terms(x: float, a: float, b: float) -> Iterator[tuple[float, float]]:
    yield -(a + b) * x / (a + 1), 1.0
    for m in range(1, _TERMS):
        yield m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), 1.0
        yield -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)), 1.0


def _gamma_tail(a: float, x: float) -> float:
    log_front = a * math.log(x) - x - math.lgamma(a)
    if x < a + 1:  # by the series of its complement
        term = total = 1 / a
        for n in range(1, _TERMS):
            term *= x / (a + n)
            total += term
            if term < total * _PRECISION:
                break
        return max(0.0, 1 - math.exp(log_front) * total)
    terms = ((-n * (n - a), x + 2 * n + 1 - a) for n in range(1, _TERMS))
    return math.exp(log_front) * _fraction(x + 1 - a, terms)


def _fraction(first: float, terms: Iterator[tuple[float, float]]) -> float:
    """1 / (first + a1 / (b1 + a2 / (b2 + …))) for the pairs (a, b) of `terms`."""
    c, d = 1 / _TINY, 1 / (first or _TINY)
    value = d
    for a, b in terms:
        d = 1 / ((b + a * d) or _TINY)
        c = (b + a / c) or _TINY
        value *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return value
