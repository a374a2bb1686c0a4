"""The tests behind "arm b is better": against integrals and simulations, not against another library's word."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.serving.gateway.traffic import distributions, significance
from sihe.serving.gateway.traffic.moments import CLUSTERS, Histogram, Moments

ALPHA = 0.05


def moments(values: np.ndarray, clusters: np.ndarray | None = None) -> Moments:
    made = Moments()
    for place, value in enumerate(values):
        made.add(float(value), place if clusters is None else int(clusters[place]))
    return made


# ---- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1.0, 2.5, 10.0, 200.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 2.0, 6.0])
def test_student_is_the_integral_of_its_density(t: float, freedom: float) -> None:
    # over s = t sqrt(n) tan(u) the density becomes a power of the cosine on a finite interval
    u = np.linspace(0, math.pi / 2, 200_001)
    weight = np.cos(u) ** (freedom - 1)
    outside = u >= math.atan(t / math.sqrt(freedom))
    expected = np.trapezoid(np.where(outside, weight, 0), u) / np.trapezoid(weight, u)
    assert distributions.student_two_sided(t, freedom) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("freedom", [1, 2, 5, 40])
@pytest.mark.parametrize("x", [0.5, 3.0, 12.0, 60.0])
def test_chi_square_is_the_integral_of_its_density(x: float, freedom: int) -> None:
    r = np.linspace(0, 40, 400_001)  # over the radius, whose density has no pole
    density = r ** (freedom - 1) * np.exp(-(r**2) / 2)
    expected = np.trapezoid(np.where(r >= math.sqrt(x), density, 0), r) / np.trapezoid(density, r)
    assert distributions.chi_square_tail(x, freedom) == pytest.approx(expected, abs=1e-4)


def test_critical_values_of_the_tables() -> None:
    assert distributions.normal_two_sided(1.959964) == pytest.approx(0.05, abs=1e-6)
    assert distributions.student_two_sided(2.228139, 10) == pytest.approx(0.05, abs=1e-6)
    assert distributions.chi_square_tail(3.841459, 1) == pytest.approx(0.05, abs=1e-6)
    assert distributions.chi_square_tail(16.918978, 9) == pytest.approx(0.05, abs=1e-6)
    assert distributions.beta_share(0.3, 1, 1) == pytest.approx(0.3)
    assert distributions.log_beta_share(1e-9, 200, 2) == pytest.approx(200 * math.log(1e-9) + math.log(201), rel=1e-9)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=60), st.floats(-1e5, 1e5))
def test_moments_are_those_of_the_values(values: list[float], shift: float) -> None:
    kept = moments(np.array(values) + shift)
    assert kept.count == len(values)
    assert kept.mean == pytest.approx(np.mean(values) + shift, abs=1e-6)
    assert kept.variance == pytest.approx(np.var(values, ddof=1), rel=1e-6, abs=1e-4)
    again = Moments.from_mapping(json.loads(json.dumps(kept.to_mapping())))
    assert (again.count, again.mean, again.variance) == (kept.count, kept.mean, kept.variance)
    assert again.variance_of_mean == kept.variance_of_mean


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=200), st.floats(0, 1), st.floats(1e-5, 1e4))
def test_quantiles_are_within_their_error(values: list[float], share: float, bound: float) -> None:
    kept = Histogram()
    for value in values:
        kept.add(value)
    exact = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    assert kept.quantile(share) == pytest.approx(exact, rel=0.026)
    above = sum(value > bound for value in values)
    surely = sum(value > bound * 1.051 for value in values)
    assert surely <= kept.above(bound) <= above
    again = Histogram.from_mapping(json.loads(json.dumps(kept.to_mapping())))
    assert (again.count, again.quantile(share)) == (kept.count, kept.quantile(share))


def test_an_empty_histogram_has_no_quantile() -> None:
    assert Histogram().quantile(0.95) is None


# ---- one look --------------------------------------------------------------------------------------------------------


def test_two_proportions_by_hand() -> None:
    found = significance.two_proportions(20, 100, 35, 100)
    assert found.statistic == pytest.approx(0.15 / math.sqrt(0.275 * 0.725 * 0.02))
    assert significance.two_proportions(0, 0, 3, 5).p_value == 1
    assert significance.two_proportions(0, 9, 0, 5).p_value == 1


def test_welch_by_permutation() -> None:
    """Where variances are equal, the p-value is that of shuffling who was in which arm."""
    random = np.random.default_rng(5)
    a, b = random.gamma(2, size=40), random.gamma(2, size=50) + 0.5
    whole, observed = np.concatenate([a, b]), b.mean() - a.mean()
    shuffled = np.array(
        [(lambda mixed: mixed[40:].mean() - mixed[:40].mean())(random.permutation(whole)) for _ in range(4000)]
    )
    assert significance.welch(moments(a), moments(b)).p_value == pytest.approx(
        (np.abs(shuffled) >= abs(observed)).mean(), abs=0.02
    )


def test_chi_square_of_a_split_and_its_sequential_form() -> None:
    assert significance.ratio_mismatch([500, 500], [0.5, 0.5]).p_value == 1
    found = significance.ratio_mismatch([530, 470], [0.5, 0.5])
    assert found.statistic == pytest.approx(3.6)
    assert significance.ratio_mismatch_always([530, 470], [0.5, 0.5]) > ALPHA
    assert significance.ratio_mismatch_always([5300, 4700], [0.5, 0.5]) < 1e-6
    assert significance.ratio_mismatch_always([900, 100], [0.9, 0.1]) == 1
    assert significance.ratio_mismatch([0, 0], [0.9, 0.1]).p_value == 1


# ---- many looks ------------------------------------------------------------------------------------------------------


def false_alarms(draw_values: str, *, trials: int = 300, number: int = 1000, every: int = 25) -> tuple[float, float]:
    """How often, between equal arms, some look finds p < alpha: in the test for one look and in the sequential one."""
    random = np.random.default_rng(11)
    once = always = 0
    test = significance.difference_of_rates if draw_values == "rate" else significance.difference
    for _ in range(trials):
        if draw_values == "rate":
            a, b = (random.random((2, number)) < 0.1).astype(float)
        else:
            a, b = random.lognormal(0, 1, (2, number))
        kept_a, kept_b = Moments(), Moments()
        least_once = least_always = 1.0
        for place in range(number):
            kept_a.add(float(a[place]), place)
            kept_b.add(float(b[place]), place + 7)
            if place % every == every - 1 and (found := test(kept_a, kept_b, alpha=ALPHA)):
                least_once = min(least_once, found.p_once)
                least_always = min(least_always, found.p_always)
        once += least_once < ALPHA
        always += least_always < ALPHA
    return once / trials, always / trials


@pytest.mark.parametrize("kind", ["rate", "mean"])
def test_looking_again_and_again_raises_no_false_alarms(kind: str) -> None:
    once, always = false_alarms(kind)
    assert once > 3 * ALPHA, "else this simulation would not tell the tests apart"
    assert always <= ALPHA


def test_the_sequential_test_finds_what_is_there() -> None:
    random = np.random.default_rng(3)
    found, covered = 0, 0
    for _ in range(60):
        a, b = moments(random.normal(1, 1, 1500)), moments(random.normal(1.2, 1, 1500))
        seen = significance.difference(a, b, alpha=ALPHA)
        assert seen is not None
        found += seen.p_always < ALPHA
        covered += abs(seen.value - 0.2) <= seen.radius
        assert (abs(seen.value) > seen.radius) == (seen.p_always < ALPHA)  # the interval and the test say the same
    assert found >= 54
    assert covered >= 57


def test_users_who_resemble_themselves_are_not_many_users() -> None:
    """Between equal arms of few users with many requests each, the variance of single requests is far too small."""
    random = np.random.default_rng(8)
    naive = aware = 0
    for _ in range(200):
        arms = []
        for _arm in range(2):
            users = np.repeat(np.arange(80), 12)
            arms.append((random.normal(0, 1, 80)[users] + random.normal(0, 1, users.size), users))
        plain = [moments(values, random.integers(0, CLUSTERS, values.size)) for values, _ in arms]
        by_user = [moments(values, users) for values, users in arms]
        naive += significance.welch(*plain).p_value < ALPHA
        aware += significance.welch(*by_user).p_value < ALPHA
    assert naive > 60
    assert aware < 22


def test_too_few_values_give_no_verdict() -> None:
    few, many = moments(np.zeros(29)), moments(np.ones(50))
    assert significance.difference(few, many, alpha=ALPHA) is None
    assert significance.difference_of_rates(many, few, alpha=ALPHA) is None


def test_constant_values() -> None:
    zeros, ones = moments(np.zeros(50)), moments(np.ones(50))
    same = significance.difference(zeros, zeros, alpha=ALPHA)
    other = significance.difference(zeros, ones, alpha=ALPHA)
    assert same is not None
    assert other is not None
    assert (same.p_once, same.p_always, other.p_once, other.p_always) == (1, 1, 0, 0)
    never_failed = significance.difference_of_rates(zeros, zeros, alpha=ALPHA)
    assert never_failed is not None
    assert never_failed.radius == math.inf  # no failure seen so far does not say that there is none


# ---- a ceiling -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(0, 40), st.floats(0.01, 0.6))
@settings(max_examples=60)
def test_evidence_is_the_integral_of_likelihood_ratios(hits: int, misses: int, ceiling: float) -> None:
    rates = np.linspace(ceiling, 1, 100_001)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.exp(
            np.where(hits > 0, hits * np.log(rates / ceiling), 0)
            + np.where(misses > 0, misses * np.log((1 - rates) / (1 - ceiling)), 0)
        )
    expected = np.trapezoid(ratio, rates) / (1 - ceiling)
    assert significance.evidence_above(hits, hits + misses, ceiling) == pytest.approx(math.log(expected), abs=2e-2)


def test_a_rate_at_its_ceiling_raises_few_alarms_and_one_above_it_is_found() -> None:
    random = np.random.default_rng(2)
    alarms = 0
    for _ in range(300):
        hits = np.cumsum(random.random(400) < 0.05)
        alarms += any(
            significance.evidence_above(int(hits[place]), place + 1, 0.05) >= math.log(1 / ALPHA)
            for place in range(0, 400, 4)
        )
    assert alarms / 300 <= ALPHA
    assert significance.evidence_above(2, 2, 0.05) >= math.log(1 / ALPHA)  # two failures of two are enough
    assert significance.evidence_above(1, 1, 0.05) < math.log(1 / ALPHA)
