"""What several processes have measured adds up to what one would have that had answered everything."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.serving.gateway.traffic import significance
from sihe.serving.gateway.traffic import tally as tallies
from sihe.serving.gateway.traffic.arm_stats import BUILT_IN, MAX_METRICS, ArmStats
from sihe.serving.gateway.traffic.assignment import ranking
from sihe.serving.gateway.traffic.experiment import Experiment, ExperimentReport, Split
from sihe.serving.gateway.traffic.moments import Moments
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.tally import Tally

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SPLIT = Split({"stable": 0.6, "b": 0.4}, {"stable": 1, "b": 2})
PROCESSES = 3

outcomes = st.builds(
    Outcome,
    st.sampled_from(["finished", "finished", "finished", "failed", "left"]),
    st.none(),
    st.none(),
    st.just(5),
    st.integers(0, 50),
    st.one_of(st.none(), st.floats(1e-4, 2.0)),
    st.floats(1e-4, 60.0),
)
# Which process answers, who asks, what becomes of it, and what is said of the answer.
requests = st.tuples(
    st.integers(0, PROCESSES - 1), st.integers(0, 30), outcomes, st.one_of(st.none(), st.floats(-1e6, 1e6))
)


def experiment() -> Experiment:
    return Experiment("chat", 1, SPLIT, NOW)


def stored(period: Experiment) -> Tally:
    """What a process has measured, as it comes out of the records."""
    return Tally.from_mapping(json.loads(json.dumps(period.to_mapping())))


def ask(period: Experiment, number: int, sender: int, outcome: Outcome, score: float | None = None) -> None:
    key = f"user-{sender}"
    arm = ranking(SPLIT.weights, key, salt="chat")[0]
    cluster = period.begin(f"r{number}", arm, key)
    period.record(arm, outcome, cluster, key)
    if score is not None:
        period.feedback(f"r{number}", {"score": score})


def same(found: ExperimentReport, expected: ExperimentReport) -> None:
    """Equal but for the last digits of sums, which depend on their order."""
    whole = (found.period, found.mismatch_p_once, found.mismatch_p_always, found.mismatched)
    assert whole == (
        expected.period,
        expected.mismatch_p_once,
        expected.mismatch_p_always,
        expected.mismatched,
    )
    for one, other in zip(found.arms, expected.arms, strict=True):
        for name in ("arm", "version", "weight", "requests", "errors", "left", "latency_p95_s", "ttft_p50_s"):
            assert getattr(one, name) == getattr(other, name), name
        for metric, its in zip(one.metrics, other.metrics, strict=True):
            assert (metric.metric, metric.count, metric.verdict) == (its.metric, its.count, its.verdict)
            for value in ("mean", "difference", "low", "high", "p_once"):
                a, b = getattr(metric, value), getattr(its, value)
                assert (a is None) == (b is None)
                assert a is None or math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6), (metric.metric, value, a, b)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, max_size=200))
def test_the_sum_of_several_is_that_of_one_that_answered_everything(
    asked: list[tuple[int, int, Outcome, float]],
) -> None:
    alone, shares = experiment(), [experiment() for _ in range(PROCESSES)]
    for number, (process, sender, outcome, score) in enumerate(asked):
        for period in (alone, shares[process]):
            ask(period, number, sender, outcome, score)
    for own in shares:  # each shows the same: its own part as it is, the others' as they have stored it
        own.hear(Tally.sum(stored(other) for other in shares if other is not own))
        same(own.report(), alone.report())
        for arm in SPLIT.weights:
            found, expected = own.stats(arm), alone.stats(arm)
            assert (found.requests, found.errors, found.left) == (expected.requests, expected.errors, expected.left)
            assert found.times["latency_s"].to_mapping().items() == expected.times["latency_s"].to_mapping().items()
            for name in expected.metrics:
                a, b = found.metric(name), expected.metric(name)
                assert math.isclose(a.squares, b.squares, rel_tol=1e-6, abs_tol=1e-3)
                assert math.isclose(a.variance_of_mean, b.variance_of_mean, rel_tol=1e-5, abs_tol=1e-9)


def test_a_sender_that_two_processes_have_answered_is_one() -> None:
    alone, first, second = experiment(), experiment(), experiment()
    done = Outcome("finished", "stop", None, 5, 10, 0.05, 0.2)
    for number in range(600):
        for period in (alone, first, second):  # a balancer that sends every user everywhere
            ask(period, number, number, done)
    first.hear(stored(second))
    assert first.report().mismatch_p_once == alone.report().mismatch_p_once
    found = Tally.sum([stored(first), stored(second)])
    assert {arm: stats.units for arm, stats in found.arms.items()} == {
        arm: stats.units for arm, stats in stored(alone).arms.items()
    }
    assert sum(stats.requests for stats in found.arms.values()) == 1200


def test_where_senders_are_too_many_all_arms_stop_at_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "MAX_SENDERS", 40)
    monkeypatch.setattr(tallies, "MAX_SENDERS_TOGETHER", 100)
    done = Outcome("finished", "stop", None, 5, 10, 0.05, 0.2)
    periods = [experiment() for _ in range(4)]
    for number in range(400):
        ask(periods[number % 4], number, number, done)
    assert [sum(stats.units for stats in stored(period).arms.values()) for period in periods] == [40] * 4
    whole = Tally.sum(stored(period) for period in periods)
    assert sum(stats.units for stats in whole.arms.values()) == 80, "of a tally that does not fit none is taken"
    assert sum(stats.requests for stats in whole.arms.values()) == 400
    assert not periods[0].report().mismatched


def test_the_smallest_p_is_that_of_all_processes_and_stays() -> None:
    slow, quick = (Outcome("finished", "stop", None, 5, 10, 0.05, latency) for latency in (0.4, 0.2))
    first, second = experiment(), experiment()

    def look(period: Experiment) -> float:
        (b,) = [arm for arm in period.report().arms if arm.arm == "b"]
        (found,) = [metric.p_always for metric in b.metrics if metric.metric == "latency_s"]
        assert found is not None
        return found

    for number in range(400):
        arm = ranking(SPLIT.weights, f"user-{number}", salt="chat")[0]
        ask(first, number, number, slow if arm == "b" and number % 2 else quick)
    least = look(first)
    assert least < 0.05
    for number in range(400, 2400):  # and then the difference goes away
        ask(second, number, number, slow if number % 4 == 0 else quick)
    second.hear(stored(first))
    assert look(second) == least, "it was seen, if by another process"
    changes = second.changes
    assert look(second) == least
    assert second.changes == changes, "what is known already is no news"
    again = experiment()
    again.hear(Tally.sum([stored(first), stored(second)]))
    assert look(again) == least


def test_processes_that_all_look_raise_no_more_alarms_than_they_may() -> None:
    """Each sees the same requests in another order, as it hears of the others' later, and the smallest p is shared."""
    random, alarms, once = np.random.default_rng(7), 0, 0
    for _ in range(80):
        own = [[Moments(), Moments()] for _ in range(PROCESSES)]
        told = [[Moments(), Moments()] for _ in range(PROCESSES)]
        least, least_once = 1.0, 1.0
        for turn in range(20):
            for process in range(PROCESSES):
                seen = [Moments(), Moments()]
                for arm in range(2):
                    for value, cluster in zip(random.lognormal(-1, 0.6, 20), random.integers(0, 64, 20), strict=True):
                        own[process][arm].add(float(value), int(cluster))
                    for other in range(PROCESSES):
                        seen[arm].absorb((own if other == process else told)[other][arm])
                found = significance.difference(seen[0], seen[1], alpha=0.05)
                if found is not None:
                    least, least_once = min(least, found.p_always), min(least_once, found.p_once)
                if (turn + process) % 3 == 0:
                    told[process] = [_copy(moments) for moments in own[process]]
        alarms += least < 0.05
        once += least_once < 0.05
    assert alarms <= 8, "5 % may"
    assert once > 20, "the test for one look raises many: there was something to keep to"


def _copy(moments: Moments) -> Moments:
    made = Moments()
    made.absorb(moments)
    return made


def test_names_of_feedback_are_bounded_together_too() -> None:
    first, second = ArmStats(), ArmStats()
    for number in range(MAX_METRICS):
        first.add(f"first-{number}", 1.0, 0)
        second.add(f"second-{number}", 1.0, 0)
    first.absorb(second)
    assert len(first.metrics) == len(BUILT_IN) + MAX_METRICS
    assert first.metric("first-3").count == 1


def test_what_was_stored_before_senders_were_kept_is_read() -> None:
    values = ArmStats().to_mapping() | {"requests": 7, "units": 5}
    del values["senders"]
    found = ArmStats.from_mapping(values)
    found.senders.add(4_294_967_295)
    again = ArmStats.from_mapping(json.loads(json.dumps(found.to_mapping())))
    assert (again.requests, again.units, again.senders) == (7, 6, {4_294_967_295})
    with pytest.raises(ValueError, match="4 bytes"):
        ArmStats.from_mapping({**values, "senders": "AAA="})
