"""Lab `router.ab`: who gets which arm, and how often an A/B test that is looked at finds what is not there."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from sihe.apps.coach.labs.types import Axis, Column, Measurement, Series, Table
from sihe.apps.coach.schema import Text
from sihe.serving.gateway.traffic.assignment import ranking
from sihe.serving.gateway.traffic.moments import Moments
from sihe.serving.gateway.traffic.significance import difference_of_rates

_USERS = 4000
_ALPHA = 0.05


def measure(parameters: Mapping[str, int | float], *, limit_s: float) -> Measurement:
    """Deals users to arms before and after a canary grows, and replays experiments with and without an effect."""
    del limit_s  # fractions of a second per hundred experiments
    experiments, looks, requests = (int(parameters[key]) for key in ("experiments", "looks", "requests"))
    rate, effect = float(parameters["rate"]) / 100, float(parameters["effect"]) / 100
    small, moved, back = dealt(0.1, 0.25)
    same = replay(experiments, looks, requests, rate, rate, seed=1)
    other = replay(experiments, looks, requests, rate, rate + effect, seed=2)
    return Measurement(
        values={
            "share": 100 * small,
            "moved": 100 * moved,
            "back": 100 * back,
            "once-at-end": 100 * same.once_last,
            "once-any-look": 100 * same.once_any[-1],
            "always-any-look": 100 * same.always_any[-1],
            "power-once": 100 * other.once_last,
            "power-always": 100 * other.always_any[-1],
            "stopped-at": other.stopped_at,
            "lehr": 16 * (rate + effect / 2) * (1 - rate - effect / 2) / effect**2,
        },
        tables=(_table(same, looks, requests),),
        series=(
            _series("once", Text(zh="只许看一次的检验", en="A test for one look"), same.once_any, looks, requests),
            _series("always", Text(zh="随时有效的检验", en="An always-valid test"), same.always_any, looks, requests),
        ),
    )


def dealt(before: float, after: float) -> tuple[float, float, float]:
    """Users that a canary of weight `before` has; those that change their arm when it grows to `after`; the wrong way.

    Shares of all users. Nobody should leave the arm that grows.
    """
    old = [ranking({"stable": 1 - before, "canary": before}, f"user-{user}", salt="lab")[0] for user in range(_USERS)]
    new = [ranking({"stable": 1 - after, "canary": after}, f"user-{user}", salt="lab")[0] for user in range(_USERS)]
    pairs = list(zip(old, new, strict=True))
    return (
        old.count("canary") / _USERS,
        pairs.count(("stable", "canary")) / _USERS,
        pairs.count(("canary", "stable")) / _USERS,
    )


@dataclass(frozen=True, slots=True)
class Replayed:
    """Shares of experiments that had found a difference by each look, and when the always-valid test had (median)."""

    once_any: list[float]  # at this look or an earlier one
    always_any: list[float]
    once_last: float  # at the last look, the only one that a test for one look is made for
    stopped_at: int  # requests of each arm


def replay(experiments: int, looks: int, requests: int, rate_a: float, rate_b: float, *, seed: int) -> Replayed:
    """Experiments that send `requests` requests to each arm in all and are looked at `looks` times, equally spaced."""
    draws = random.Random(seed)
    each = requests // looks
    once_any, always_any, once_last, stops = [0] * looks, [0] * looks, 0, []
    for _ in range(experiments):
        a, b = Moments(), Moments()
        has_once = has_always = is_last = False
        for look in range(looks):
            for request in range(look * each, (look + 1) * each):  # every request is of another user
                a.add(float(draws.random() < rate_a), request)
                b.add(float(draws.random() < rate_b), request)
            found = difference_of_rates(a, b, alpha=_ALPHA)
            is_last = found is not None and found.p_once < _ALPHA
            has_once |= is_last
            if not has_always and found is not None and found.p_always < _ALPHA:
                has_always = True
                stops.append((look + 1) * each)
            once_any[look] += has_once
            always_any[look] += has_always
        once_last += is_last
    return Replayed(
        [count / experiments for count in once_any],
        [count / experiments for count in always_any],
        once_last / experiments,
        sorted(stops)[len(stops) // 2] if stops else requests,
    )


def _table(same: Replayed, looks: int, requests: int) -> Table:
    return Table(
        key="alarms",
        title=Text(
            zh="没有差别时，至今报过警的实验", en="Experiments with an alarm so far, where there is no difference"
        ),
        columns=(
            Column(label=Text(zh="看过几次", en="Looks")),
            Column(label=Text(zh="每组请求", en="Requests of each arm")),
            Column(label=Text(zh="只许看一次的检验", en="A test for one look"), unit="%", provenance="measured"),
            Column(label=Text(zh="随时有效的检验", en="Always-valid test"), unit="%", provenance="measured"),
        ),
        rows=tuple(
            (
                look + 1,
                (look + 1) * (requests // looks),
                round(100 * same.once_any[look], 1),
                round(100 * same.always_any[look], 1),
            )
            for look in range(0, looks, max(1, looks // 8))
        ),
    )


def _series(key: str, label: Text, shares: list[float], looks: int, requests: int) -> Series:
    return Series(
        key=key,
        chart="alarms",
        label=label,
        x=Axis(label=Text(zh="每组请求", en="Requests of each arm")),
        y=Axis(label=Text(zh="至今报过警的实验", en="Experiments with an alarm so far"), unit="%"),
        provenance="measured",
        points=tuple((float((look + 1) * (requests // looks)), 100 * share) for look, share in enumerate(shares)),
    )
