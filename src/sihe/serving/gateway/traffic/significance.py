"""Whether two arms differ, by tests that are honest about how often one looks. Pure functions.

*Once*: two proportions (z) and two means (Welch's t), right when the number of requests was fixed before. Whoever looks
at them again and again and stops at the first small p finds differences that are not there.

*Always valid*: the mixture sequential probability ratio test. Its p-value may be looked at after every request: the
probability that it *ever* falls below alpha without a difference is at most alpha. (Johari, Pekelis and Walsh, "Always
Valid Inference", arXiv:1512.04922, section 5; with an estimated variance it holds as the numbers grow: Waudby-Smith et
al., arXiv:2103.06476. Hence no verdict below `LEAST_VALUES`.)

For a rate that must not exceed a ceiling: a mixture of Bernoulli likelihood ratios over all rates above it, exact from
the first request (a test martingale; Ville's inequality).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sihe.serving.gateway.traffic.distributions import (
    chi_square_tail,
    log_beta,
    log_beta_share,
    normal_two_sided,
    student_two_sided,
)
from sihe.serving.gateway.traffic.moments import Moments

LEAST_VALUES = 30  # of each arm, before an estimated variance is believed
EFFECT = 0.2  # the size of a difference, in standard deviations, that the sequential test is most sensitive to


@dataclass(frozen=True, slots=True)
class Test:
    """A statistic and its two-sided p-value, for one look."""

    statistic: float
    p_value: float


def two_proportions(hits_a: int, number_a: int, hits_b: int, number_b: int) -> Test:
    """z of the difference of two rates, b less a, with the pooled variance; p 1 where nothing can be said."""
    if number_a == 0 or number_b == 0:
        return Test(0.0, 1.0)
    pooled = (hits_a + hits_b) / (number_a + number_b)
    variance = pooled * (1 - pooled) * (1 / number_a + 1 / number_b)
    if variance == 0:
        return Test(0.0, 1.0)
    z = (hits_b / number_b - hits_a / number_a) / math.sqrt(variance)
    return Test(z, normal_two_sided(z))


def welch(a: Moments, b: Moments) -> Test:
    """t of the difference of two means, b less a, with unequal variances; p 1 where nothing can be said.

    (Welch, Biometrika 34, 1947; the variances regard clusters, see `Moments`.)
    """
    if a.count < 2 or b.count < 2:
        return Test(0.0, 1.0)
    of_a, of_b = a.variance_of_mean, b.variance_of_mean
    if of_a + of_b == 0:
        return Test(0.0, 1.0 if a.mean == b.mean else 0.0)
    t = (b.mean - a.mean) / math.sqrt(of_a + of_b)
    freedom = (of_a + of_b) ** 2 / (of_a**2 / (a.count - 1) + of_b**2 / (b.count - 1))
    return Test(t, student_two_sided(t, freedom))


def always_valid_p(difference: float, variance: float, spread: float) -> float:
    """p of the mixture test at this look; the least over all looks is an always-valid p-value.

    `variance` is that of `difference`, and `spread` the standard deviation of the mixture over differences.
    """
    if variance <= 0 or spread <= 0:
        return 1.0
    mixed = variance + spread**2
    log_ratio = 0.5 * math.log(variance / mixed) + spread**2 * difference**2 / (2 * variance * mixed)
    return math.exp(-max(0.0, log_ratio))


def always_valid_radius(variance: float, spread: float, alpha: float) -> float:
    """Half the width of the interval that holds the true difference at all times with probability 1 - alpha."""
    if variance <= 0 or spread <= 0:
        return math.inf
    mixed = variance + spread**2
    return math.sqrt(2 * variance * mixed / spread**2 * (math.log(1 / alpha) + 0.5 * math.log(mixed / variance)))


@dataclass(frozen=True, slots=True)
class Difference:
    """How a metric of an arm differs from the reference's: `value` is arm less reference, within `radius` always."""

    value: float
    radius: float
    p_once: float
    p_always: float


def difference(reference: Moments, arm: Moments, *, alpha: float) -> Difference | None:
    """The difference of two means; None while either has fewer than `LEAST_VALUES` values."""
    if min(reference.count, arm.count) < LEAST_VALUES:
        return None
    variance = reference.variance_of_mean + arm.variance_of_mean
    value = arm.mean - reference.mean
    spread = EFFECT * math.sqrt((reference.variance + arm.variance) / 2)
    return Difference(
        value,
        always_valid_radius(variance, spread, alpha),
        welch(reference, arm).p_value,
        always_valid_p(value, variance, spread) if variance > 0 else (1.0 if value == 0 else 0.0),
    )


def difference_of_rates(reference: Moments, arm: Moments, *, alpha: float) -> Difference | None:
    """The same for metrics that are 0 or 1, with the pooled variance, which exists also where one rate is 0."""
    if min(reference.count, arm.count) < LEAST_VALUES:
        return None
    pooled = (reference.total + arm.total) / (reference.count + arm.count)
    single = pooled * (1 - pooled)
    variance = max(
        single * (1 / reference.count + 1 / arm.count), reference.variance_of_mean + arm.variance_of_mean
    )  # the second is larger where clusters differ
    value = arm.mean - reference.mean
    spread = EFFECT * math.sqrt(single)
    hits = (round(reference.total), reference.count, round(arm.total), arm.count)
    return Difference(
        value,
        always_valid_radius(variance, spread, alpha),
        two_proportions(*hits).p_value,
        always_valid_p(value, variance, spread),
    )


def evidence_above(hits: int, number: int, ceiling: float) -> float:
    """Natural log of the evidence that a rate exceeds `ceiling` (0 < ceiling < 1), after `hits` of `number`.

    Where the rate is at most the ceiling, the probability that it ever reaches log(1 / alpha) is at most alpha.
    """
    a, b = hits + 1, number - hits + 1
    marginal = log_beta(a, b) + log_beta_share(1 - ceiling, b, a) - math.log1p(-ceiling)
    return marginal - hits * math.log(ceiling) - (number - hits) * math.log1p(-ceiling)


def ratio_mismatch(counts: Sequence[int], shares: Sequence[float]) -> Test:
    """Chi-square of counts against the shares that they should have (Pearson), for one look."""
    number, whole = sum(counts), sum(shares)
    if number == 0 or len(counts) < 2:
        return Test(0.0, 1.0)
    expected = [number * share / whole for share in shares]
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    return Test(statistic, chi_square_tail(statistic, len(counts) - 1))


def ratio_mismatch_always(counts: Sequence[int], shares: Sequence[float], *, weight: float = 100.0) -> float:
    """p of a mismatch that may be looked at at any time: Dirichlet mixture against the multinomial of `shares`.

    `weight` is how closely the mixture lies around the shares. (Lindon and Malek, "Anytime-Valid Inference for
    Multinomial Count Data", NeurIPS 2022, arXiv:2011.03567.)
    """
    number, whole = sum(counts), sum(shares)
    if number == 0 or len(counts) < 2:
        return 1.0
    log_ratio = math.lgamma(weight) - math.lgamma(weight + number)
    for count, share in zip(counts, shares, strict=True):
        prior = weight * share / whole
        log_ratio += math.lgamma(prior + count) - math.lgamma(prior) - count * math.log(share / whole)
    return math.exp(-max(0.0, log_ratio))
