"""A canary's decisions, simulated: good ones arrive, bad ones go back soon, and what is unknown waits."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import InvalidInput
from sihe.serving.gateway.traffic.arm_stats import ArmStats
from sihe.serving.gateway.traffic.outcome import Outcome
from sihe.serving.gateway.traffic.rollout import Decision, Gates, Move, Plan, Rollout, RolloutState, Sight, Step, decide

NOW = datetime(2026, 1, 2, tzinfo=UTC)
PLAN = Plan(steps=(Step(0.1, min_requests=60, min_s=10), Step(0.5, min_requests=60, min_s=10)), patience_s=100)


def rollout(plan: Plan = PLAN, *, step: int = 0, state: RolloutState = RolloutState.RUNNING) -> Rollout:
    return Rollout("r1", "chat", "canary", "tiny", 2, None, plan, state, step, "", NOW, NOW)


def outcome(latency_s: float = 0.2, *, failed: bool = False, ttft_s: float = 0.05) -> Outcome:
    if failed:
        return Outcome("failed", None, "GenerationFailed: not finite", 3, 0, None, latency_s)
    return Outcome("finished", "stop", None, 3, 10, ttft_s, latency_s)


def stats(*outcomes: Outcome) -> ArmStats:
    made = ArmStats()
    for place, item in enumerate(outcomes):
        made.record(item, place)
    return made


def sight(stable: ArmStats, canary: ArmStats, *, step_s: float = 20.0) -> Sight:
    return Sight(True, 0.0, has_failed=False, fault=None, step_s=step_s, stable=stable, canary=canary)


GOOD = stats(*[outcome()] * 100)


def test_a_good_canary_climbs_and_is_promoted() -> None:
    assert decide(rollout(), sight(GOOD, GOOD)).move is Move.ADVANCE
    assert decide(rollout(step=1), sight(GOOD, GOOD)).move is Move.PROMOTE


@pytest.mark.parametrize(
    ("canary", "step_s", "reason"),
    [
        (stats(*[outcome()] * 59), 20.0, "59 of 60 requests"),
        (GOOD, 9.0, "9 of 10 s"),
        (ArmStats(), 1e6, "0 of 60 requests"),
    ],
)
def test_what_has_not_been_seen_is_waited_for(canary: ArmStats, step_s: float, reason: str) -> None:
    decision = decide(rollout(), sight(GOOD, canary, step_s=step_s))
    assert decision.move is Move.HOLD
    assert reason in decision.reason


def test_a_canary_that_only_fails_goes_back_after_a_handful_of_requests() -> None:
    moves = [
        decide(rollout(), sight(GOOD, stats(*[outcome(failed=True)] * number), step_s=0)).move for number in range(6)
    ]
    assert moves[:2] == [Move.HOLD, Move.HOLD]
    assert moves.index(Move.ROLL_BACK) <= 3


def test_a_canary_that_fails_as_often_as_the_stable_version_is_no_worse() -> None:
    flaky = stats(*[outcome(failed=place % 5 == 0) for place in range(100)])
    assert decide(rollout(), sight(flaky, flaky)).move is Move.ADVANCE
    assert decide(rollout(), sight(GOOD, flaky)).move is Move.ROLL_BACK


@pytest.mark.parametrize("gate", ["latency_s", "ttft_s"])
def test_a_slow_canary_goes_back(gate: str) -> None:
    slow = stats(*[outcome(2.0) if gate == "latency_s" else outcome(0.2, ttft_s=0.19)] * 60)
    decision = decide(rollout(), sight(GOOD, slow))
    assert decision.move is Move.ROLL_BACK
    assert gate in decision.reason
    blind = replace(PLAN, gates=Gates(max_latency_ratio=None, max_ttft_ratio=None))
    assert decide(rollout(blind), sight(GOOD, slow)).move is Move.ADVANCE


def test_what_looks_bad_without_proof_is_waited_for_until_patience_ends() -> None:
    unlucky = stats(*[outcome(failed=place < 2) for place in range(70)])  # 2.9 %, and 2 % may
    assert decide(rollout(), sight(GOOD, unlucky)).move is Move.HOLD
    ended = decide(rollout(), sight(GOOD, unlucky, step_s=111))
    assert ended.move is Move.ROLL_BACK
    assert "no proof" in ended.reason


def test_nothing_to_compare_with_is_waited_for() -> None:
    decision = decide(rollout(), sight(ArmStats(), GOOD))
    assert decision == Decision(Move.HOLD, "the stable version has answered 0 of 30 requests to compare with")


def test_quality_is_a_gate() -> None:
    plan = replace(PLAN, gates=Gates(metric="helpful", max_drop=0.05))
    random = np.random.default_rng(1)

    def judged(mean: float) -> ArmStats:
        made = stats(*[outcome()] * 400)
        for place, value in enumerate(random.normal(mean, 0.3, 400)):
            made.add("helpful", float(value), place)
        return made

    stable = judged(0.8)
    assert decide(rollout(plan), sight(stable, GOOD)).reason.startswith("helpful has 0 of 30")
    assert decide(rollout(plan), sight(stable, judged(0.8))).move is Move.ADVANCE
    worse = decide(rollout(plan), sight(stable, judged(0.6)))
    assert worse.move is Move.ROLL_BACK
    assert "helpful" in worse.reason


def test_a_canary_that_cannot_serve_waits_and_then_goes_back() -> None:
    unready = replace(sight(GOOD, ArmStats(), step_s=0), is_ready=False, unready_s=10.0, fault="no memory")
    assert decide(rollout(), unready) == Decision(Move.HOLD, "the canary cannot serve yet: no memory")
    failed = replace(unready, has_failed=True)
    assert decide(rollout(), failed).move is Move.HOLD
    assert decide(rollout(), replace(failed, unready_s=31.0)).move is Move.ROLL_BACK
    assert decide(rollout(), replace(unready, unready_s=31.0)).move is Move.HOLD
    late = decide(rollout(), replace(unready, unready_s=301.0))
    assert late.move is Move.ROLL_BACK
    assert "no memory" in late.reason


@pytest.mark.parametrize("state", [state for state in RolloutState if state is not RolloutState.RUNNING])
def test_only_a_running_rollout_moves_by_itself(state: RolloutState) -> None:
    broken = stats(*[outcome(failed=True)] * 50)
    assert decide(rollout(state=state), sight(GOOD, broken)).move is Move.HOLD


def simulate(error_rate: float, slowdown: float, random: np.random.Generator) -> tuple[Move, int]:
    """The last move of a rollout whose canary errs and takes time as given, and the requests that it got to answer."""
    plan = Plan(steps=(Step(0.1, 50, 0), Step(0.5, 100, 0)), patience_s=100)
    current, asked = rollout(plan), 0
    stable, canary = ArmStats(), ArmStats()
    for second in range(4000):
        for arm, number, rate, factor in ((stable, 5, 0.01, 1.0), (canary, 1, error_rate, slowdown)):
            for _ in range(number):
                latency = float(random.lognormal(-1.5, 0.6)) * factor
                arm.record(
                    outcome(latency, failed=random.random() < rate, ttft_s=latency / 4), int(random.integers(64))
                )
        asked += 1
        decision = decide(current, sight(stable, canary, step_s=second))
        if decision.move is Move.ADVANCE:
            current, stable, canary = current.at_step(current.step + 1, NOW), ArmStats(), ArmStats()
        elif decision.move is not Move.HOLD:
            return decision.move, asked
    return Move.HOLD, asked


def test_rollouts_of_equal_versions_arrive_though_they_are_judged_after_every_request() -> None:
    random = np.random.default_rng(7)
    moves = [simulate(0.01, 1.0, random)[0] for _ in range(40)]
    assert moves.count(Move.PROMOTE) >= 38


@pytest.mark.parametrize(("error_rate", "slowdown", "requests"), [(1.0, 1.0, 4), (0.2, 1.0, 80), (0.01, 4.0, 80)])
def test_rollouts_of_worse_versions_go_back_soon(error_rate: float, slowdown: float, requests: int) -> None:
    random = np.random.default_rng(9)
    ends = [simulate(error_rate, slowdown, random) for _ in range(20)]
    assert {move for move, _ in ends} == {Move.ROLL_BACK}
    assert max(asked for _, asked in ends) <= requests


# ---- values ----------------------------------------------------------------------------------------------------------


def test_a_plan_survives_the_records() -> None:
    plan = Plan(steps=(Step(0.2, 5, 1.5), Step(0.9)), gates=Gates(0.1, None, 2.0, "helpful", 0.5), ready_s=1)
    assert Plan.from_mapping(plan.to_mapping()) == plan
    assert Plan.from_mapping({}) == Plan()


@pytest.mark.parametrize(
    "values",
    [
        {"steps": []},
        {"steps": [{"weight": 0.5}, {"weight": 0.1}]},
        {"steps": [{"weight": 1.0}]},
        {"steps": [{"weight": 0}]},
        {"steps": [{"share": 0.5}]},
        {"steps": [{"weight": 0.5, "min_requests": 0}]},
        {"steps": [{"weight": "half"}]},
        {"gates": {"max_error_rate": 0}},
        {"gates": {"max_latency_ratio": 0.5}},
        {"gates": {"max_drop": float("nan")}},
        {"gates": {"alpha": 1}},
        {"speed": 3},
        {"ready_s": -1},
        {"steps": [{"weight": 0.1, "min_s": math.nan}]},
        {"steps": [{"weight": 0.1, "min_s": math.inf}]},
        {"steps": [{"weight": 0.1, "min_requests": math.nan}]},
        {"steps": [{"weight": 0.1, "min_requests": 1.5}]},
        {"steps": [{"weight": 0.1, "min_requests": True}]},
        {"ready_s": math.nan},
        {"patience_s": math.inf},
    ],
)
def test_wrong_plans_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        Plan.from_mapping(values)


@given(st.lists(st.booleans(), max_size=200))
def test_a_decision_is_a_function_of_what_is_seen(failures: list[bool]) -> None:
    canary = stats(*[outcome(failed=failed) for failed in failures])
    again = ArmStats.from_mapping(canary.to_mapping())
    assert decide(rollout(), sight(GOOD, canary)) == decide(rollout(), sight(GOOD, again))
