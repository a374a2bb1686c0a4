"""A period's arms beside each other: what is recorded is what is reported, and a broken split is seen."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from sihe.core.clock import FakeClock
from sihe.core.errors import AlreadyExists, InvalidInput, NotFound
from sihe.serving.engine.config import EngineConfig
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import GenerationEvent, Usage
from sihe.serving.errors import DeadlineExceeded
from sihe.serving.gateway.traffic.arm_stats import MAX_METRICS
from sihe.serving.gateway.traffic.assignment import ranking
from sihe.serving.gateway.traffic.experiment import MAX_RECENT, Experiment, ExperimentReport, Split
from sihe.serving.gateway.traffic.handover import Handover
from sihe.serving.gateway.traffic.outcome import Observation, Outcome
from sihe.serving.gateway.traffic.tally import Tally
from sihe.serving.gateway.traffic.types import Arm, LogPolicy, Sender, Shadow, TrafficPolicy, sticky_key

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SPLIT = Split({"stable": 0.5, "b": 0.5}, {"stable": 1, "b": 2})
DONE = Outcome("finished", "stop", None, 5, 10, 0.05, 0.2)
FAILED = Outcome("failed", None, "GenerationFailed", 5, 0, None, 0.1)


def experiment() -> Experiment:
    return Experiment("chat", 1, SPLIT, NOW)


def ask(period: Experiment, number: int, outcome: Outcome = DONE, *, arm: str | None = None) -> str:
    """One request of one sender; its arm."""
    key = f"user-{number}"
    chosen = arm or ranking(SPLIT.weights, key, salt="chat")[0]
    cluster = period.begin(f"req-{number}", chosen, key)
    period.record(chosen, outcome, cluster, key)
    return chosen


def row(report: ExperimentReport, arm: str, metric: str) -> float:
    (found,) = [item for one in report.arms if one.arm == arm for item in one.metrics if item.metric == metric]
    return found.mean


def test_what_is_recorded_is_what_is_reported() -> None:
    period = experiment()
    for number in range(20):
        ask(period, number, replace(DONE, latency_s=0.1 * (number + 1)), arm="b")
    ask(period, 20, FAILED, arm="b")
    ask(period, 21, replace(DONE, ending="left"), arm="b")
    arms = {arm.arm: arm for arm in period.report().arms}
    b = arms["b"]
    assert (b.version, b.weight, b.requests, b.errors, b.left) == (2, 0.5, 21, 1, 1)
    assert b.latency_p50_s == pytest.approx(1.0, rel=0.03)
    assert b.latency_p95_s == pytest.approx(1.9, rel=0.03)
    assert row(period.report(), "b", "error") == pytest.approx(1 / 21)
    assert row(period.report(), "b", "tpot_s") == pytest.approx((1.05 - 0.05) / 9)
    assert arms["stable"].requests == 0
    assert arms["stable"].latency_p95_s is None


def test_equal_arms_stay_undecided_and_a_worse_one_is_named() -> None:
    random = np.random.default_rng(4)
    same, worse = experiment(), experiment()
    for number in range(1200):
        latency = float(random.lognormal(-1, 0.5))
        ask(same, number, replace(DONE, latency_s=latency))
        arm = ranking(SPLIT.weights, f"user-{number}", salt="chat")[0]
        ask(worse, number, replace(DONE, latency_s=latency * (1.5 if arm == "b" else 1.0)))
    verdicts = [
        {metric.metric: metric.verdict for arm in period.report().arms for metric in arm.metrics if arm.arm == "b"}
        for period in (same, worse)
    ]
    assert verdicts[0] == dict.fromkeys(["error", "latency_s", "ttft_s", "tpot_s", "completion_tokens"], "undecided")
    assert verdicts[1]["latency_s"] == "worse"
    assert verdicts[1]["tpot_s"] == "worse"
    assert verdicts[1]["error"] == "undecided"
    assert not worse.report().mismatched


def test_an_arm_whose_requests_get_lost_is_seen_in_the_split() -> None:
    period = experiment()
    for number in range(2000):
        arm = ranking(SPLIT.weights, f"user-{number}", salt="chat")[0]
        if arm == "b" and number % 4 == 0:
            period.begin(f"req-{number}", arm, f"user-{number}")  # and never ends
        else:
            ask(period, number)
    report = period.report()
    assert report.mismatched
    assert report.mismatch_p_once < 0.001


def test_one_sender_with_many_requests_is_one_in_the_split() -> None:
    period = experiment()
    for number in range(200):
        ask(period, number)
    for number in range(2000):
        cluster = period.begin(f"again-{number}", "b", "user-0")
        period.record("b", DONE, cluster, "user-0")
    assert not period.report().mismatched


# ---- feedback --------------------------------------------------------------------------------------------------------


def test_feedback_goes_to_the_arm_that_answered_and_once() -> None:
    period = experiment()
    arms = [ask(period, number) for number in range(100)]
    for number, arm in enumerate(arms):
        assert period.feedback(f"req-{number}", {"helpful": 1.0 if arm == "b" else 0.0}) == arm
    report = period.report()
    assert (row(report, "stable", "helpful"), row(report, "b", "helpful")) == (0, 1)
    (found,) = [item for arm in report.arms if arm.arm == "b" for item in arm.metrics if item.metric == "helpful"]
    assert found.verdict == "better"
    with pytest.raises(AlreadyExists):
        period.feedback("req-3", {"helpful": 0.0})
    period.feedback("req-3", {"stars": 4.0})


@pytest.mark.parametrize(
    ("request_id", "values", "error"),
    [
        ("absent", {"helpful": 1.0}, NotFound),
        ("req-0", {"helpful": float("inf")}, InvalidInput),
        ("req-0", {"latency_s": 1.0}, InvalidInput),
        ("req-0", {"../x": 1.0}, InvalidInput),
    ],
)
def test_wrong_feedback_is_refused(request_id: str, values: dict[str, float], error: type[Exception]) -> None:
    period = experiment()
    ask(period, 0)
    with pytest.raises(error):
        period.feedback(request_id, values)


def test_what_clients_can_make_grow_is_bounded() -> None:
    period = experiment()
    ask(period, 0)
    with pytest.raises(InvalidInput, match=f"at most {MAX_METRICS}"):
        for number in range(MAX_METRICS + 1):
            period.feedback("req-0", {f"metric-{number}": 1.0})
    for number in range(MAX_RECENT):
        period.begin(f"more-{number}", "b", "key")
    with pytest.raises(NotFound):
        period.feedback("req-0", {"late": 1.0})


def test_a_version_that_becomes_known_is_what_has_answered_until_then() -> None:
    period = Experiment("chat", 1, Split({"stable": 1.0}, {"stable": None}), NOW)
    ask(period, 1, arm="stable")
    later = NOW + timedelta(seconds=5)
    known = Split({"stable": 1.0}, {"stable": 4})
    assert period.followed_by(known, later) is period
    assert period.feedback("req-1", {"helpful": 1.0}) == "stable"
    (arm,) = period.report().arms
    assert (arm.version, arm.requests, period.started_at) == (4, 1, later)
    assert period.followed_by(Split({"stable": 1.0}, {"stable": 5}), later).period == 2


def test_an_arm_that_joins_others_begins_a_period_with_them_and_its_answers_may_still_be_judged() -> None:
    period = Experiment("chat", 1, Split(SPLIT.weights, {"stable": 1, "b": None}), NOW)
    ask(period, 1, arm="b")
    assert period.followed_by(SPLIT, NOW) is period, "nobody was measured without it"
    period = Experiment("chat", 1, Split(SPLIT.weights, {"stable": 1, "b": None}), NOW)
    ask(period, 1, arm="stable")
    ask(period, 2, arm="b")
    following = period.followed_by(SPLIT, NOW)
    assert (following.period, following.split) == (2, SPLIT)
    assert {arm.arm: arm.requests for arm in following.report().arms} == {"stable": 0, "b": 0}
    assert following.feedback("req-2", {"helpful": 1.0}) == "b"
    with pytest.raises(NotFound):
        following.feedback("req-1", {"helpful": 1.0})


@pytest.mark.parametrize(
    "split",
    [
        Split({"stable": 0.4, "b": 0.6}, SPLIT.versions),
        Split(SPLIT.weights, {"stable": 1, "b": 3}),
        Split({"stable": 1.0}, {"stable": 1}),
        Split({"stable": 0.5, "c": 0.5}, {"stable": 1, "c": None}),
    ],
)
def test_weights_and_versions_that_change_begin_a_period_also_where_nothing_was_measured(split: Split) -> None:
    period = experiment()
    period.begin("req-1", "b", "key")
    following = period.followed_by(split, NOW)
    assert (following.period, following.split) == (2, split)
    with pytest.raises(NotFound):
        following.feedback("req-1", {"helpful": 1.0})


def test_a_period_goes_on_after_a_restart() -> None:
    period = experiment()
    for number in range(300):
        ask(period, number, replace(DONE, latency_s=0.1 + number / 1000))
    before = period.report()
    again = experiment()
    again.hear(Tally.from_mapping(json.loads(json.dumps(period.to_mapping()))))
    assert again.report() == before


# ---- how an outcome is heard -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_text", [True, False])
def test_an_outcome_is_heard_from_the_stream(keeps_text: bool) -> None:
    clock, outcomes = FakeClock(), list[Outcome]()
    stream = GenerationStream(1, "tiny@1", abort=lambda _: None)
    stream.watch(Observation(clock, clock.monotonic_s(), outcomes.append, keeps_text=keeps_text))
    clock.advance(0.5)
    stream.deliver(GenerationEvent("a", (1,), Usage(7, 1)))
    clock.advance(1)
    stream.deliver(GenerationEvent("b", (2,), Usage(7, 2), "length"))
    stream.close()
    (found,) = outcomes
    assert (found.ending, found.finish_reason, found.ttft_s, found.latency_s) == ("finished", "length", 0.5, 1.5)
    assert (found.prompt_tokens, found.completion_tokens, found.tpot_s) == (7, 2, 1.0)
    assert (found.text, found.token_ids) == (("ab", (1, 2)) if keeps_text else (None, ()))


def test_a_reader_that_leaves_is_no_failure_of_the_arm() -> None:
    outcomes = list[Outcome]()
    for end in ("close", "fail"):
        stream = GenerationStream(1, "tiny@1", abort=lambda _: None)
        stream.watch(Observation(FakeClock(), 0.0, outcomes.append, keeps_text=False))
        stream.close() if end == "close" else stream.fail(RuntimeError("boom"))
    assert [(found.ending, found.error) for found in outcomes] == [("left", None), ("failed", "RuntimeError: boom")]


# ---- policies --------------------------------------------------------------------------------------------------------


def test_a_policy_survives_the_records() -> None:
    policy = TrafficPolicy(
        (Arm("b", "tiny", "2", 0.3, EngineConfig(max_batch_size=4)), Arm("c", "tiny", "new", 0.2)),
        Shadow("tiny", "3", 0.5, only_idle=False),
        LogPolicy(0.1, text=True),
        "tenant",
        "autumn",
    )
    assert TrafficPolicy.from_mapping(json.loads(json.dumps(policy.to_mapping()))) == policy
    assert TrafficPolicy.from_mapping(None) == TrafficPolicy()
    assert policy.weights == {"stable": 0.5, "b": 0.3, "c": 0.2}
    assert policy.without_arm("b").weights == {"stable": 0.8, "c": 0.2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Arm("stable", "tiny", "2", 0.1),
        lambda: Arm("b", "tiny", "2", 0),
        lambda: Arm("b", "tiny", "2", 1.5),
        lambda: Arm("b", "tiny", "2", float("nan")),
        lambda: TrafficPolicy((Arm("b", "tiny", "2", 0.6), Arm("c", "tiny", "2", 0.6))),
        lambda: TrafficPolicy((Arm("b", "tiny", "2", 0.1), Arm("b", "tiny", "3", 0.1))),
        lambda: TrafficPolicy(tuple(Arm(f"a{number}", "tiny", "2", 0.01) for number in range(9))),
        lambda: TrafficPolicy(sticky="colour"),  # type: ignore[arg-type]
        lambda: Shadow("tiny", "2", 0.5, max_waiting=0),
        lambda: LogPolicy(-0.1),
    ],
)
def test_wrong_policies_are_refused(make: object) -> None:
    with pytest.raises(InvalidInput):
        make()  # type: ignore[operator]


def test_by_what_a_sender_is_known() -> None:
    known, nobody = Sender("r", "u1"), Sender("r")
    session, tenant, none = (TrafficPolicy(sticky=kind) for kind in ("session", "tenant", "none"))  # type: ignore[arg-type]
    assert (
        sticky_key(session, known, "acme") == sticky_key(tenant, known, "acme") != sticky_key(session, known, "other")
    )
    assert sticky_key(session, nobody, "acme") is None
    assert sticky_key(tenant, nobody, "acme") == "tenant:acme"
    assert sticky_key(tenant, nobody, "") is None
    assert sticky_key(none, known, "acme") is None


# ---- what clients may send -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e10, -1e300, float("inf"), float("nan")])
def test_a_value_that_would_spoil_the_sums_is_refused(value: float) -> None:
    period = experiment()
    ask(period, 1)
    with pytest.raises(InvalidInput, match="helpful"):
        period.feedback("req-1", {"helpful": value})
    period.feedback("req-1", {"helpful": 1e9})
    json.dumps(period.to_mapping(), allow_nan=False)


def test_of_feedback_that_comes_together_all_is_taken_or_nothing() -> None:
    period = experiment()
    arm = ask(period, 1)
    for wrong in ({"helpful": 1.0, "latency_s": 2.0}, {"helpful": 1.0, "no good name": 1.0}):
        with pytest.raises(InvalidInput):
            period.feedback("req-1", wrong)
    assert "helpful" not in period.stats(arm).metrics
    assert period.feedback("req-1", {"helpful": 1.0, "kind": 0.5}) == arm
    with pytest.raises(AlreadyExists):
        period.feedback("req-1", {"kind": 0.5})


def test_a_limit_that_a_client_set_itself_is_no_failure_of_the_arm() -> None:
    outcomes = list[Outcome]()
    for is_own in (True, False):
        stream = GenerationStream(1, "tiny@1", abort=lambda _: None)
        stream.watch(Observation(FakeClock(), 0.0, outcomes.append, keeps_text=False))
        stream.fail(DeadlineExceeded(0.1, begun=False, is_own=is_own))
    assert [found.ending for found in outcomes] == ["left", "failed"]


# ---- an answer that changes its arm ----------------------------------------------------------------------------------


def handed_over(error: Exception) -> tuple[GenerationStream, list[GenerationStream]]:
    """The caller's stream when its arm has failed, and what was started instead."""
    first, second = (GenerationStream(number, f"tiny@{number}", abort=lambda _: None) for number in (1, 2))
    started: list[GenerationStream] = []
    done = threading.Event()

    def otherwise() -> GenerationStream:
        started.append(second)
        done.set()
        return second

    handover = Handover(first, otherwise)
    first.watch(handover.hear)
    first.fail(error)
    if not isinstance(error, DeadlineExceeded):
        assert done.wait(30)
    return handover.answer, started


def test_who_answers_is_known_when_the_first_token_comes() -> None:
    answer, (second,) = handed_over(RuntimeError("an arm"))
    second.served_by = "tiny@3"  # another replica took it meanwhile
    second.deliver(GenerationEvent("a", (1,), Usage(3, 1), "stop"))
    assert answer.result(30).text == "a"
    assert answer.served_by == "tiny@3"
    assert second.next_event(0) is None, "an answer is not kept twice"


def test_when_the_time_is_up_no_arm_gets_more_of_it() -> None:
    answer, started = handed_over(DeadlineExceeded(1.0, begun=False))
    with pytest.raises(DeadlineExceeded):
        answer.result(30)
    assert started == []
