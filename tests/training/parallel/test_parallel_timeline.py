"""The orders of the schedules, and the bubbles that follow from them."""

from __future__ import annotations

from typing import get_args

import pytest

from sihe.training.parallel.plan import ParallelPlan, Schedule
from sihe.training.parallel.stage import rank_of_stage
from sihe.training.parallel.timeline import Span, StageTimes, Work, bubble, order, timeline


def plan_for(schedule: Schedule, pp: int, microbatches: int, stages: int = 2) -> ParallelPlan:
    stages = 1 if schedule in ("gpipe", "1f1b") else stages
    return ParallelPlan(pp=pp, schedule=schedule, stages_per_rank=stages, microbatches=microbatches)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize(("pp", "microbatches"), [(2, 4), (4, 8), (4, 16)])
def test_each_stage_sees_each_micro_batch_once_each_way(schedule: Schedule, pp: int, microbatches: int) -> None:
    plan = plan_for(schedule, pp, microbatches)
    works = [(rank, work) for rank, works in enumerate(order(plan)) for work in works]
    assert all(rank == rank_of_stage(plan, work.stage) for rank, work in works)
    pairs = {(stage, micro) for stage in range(plan.num_stages) for micro in range(microbatches)}
    by_kind = {kind: [(w.stage, w.microbatch) for _, w in works if w.kind == kind] for kind in "FBIW"}
    assert sorted(by_kind["F"]) == sorted(pairs)
    assert sorted(by_kind["B"] + by_kind["I"]) == sorted(pairs)
    assert sorted(by_kind["I"]) == sorted(by_kind["W"])


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(2, 2), (2, 8), (4, 8), (8, 32)])
def test_the_bubble_of_one_stage_a_rank(schedule: Schedule, p: int, m: int) -> None:
    assert bubble(timeline(plan_for(schedule, p, m))) == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "m", "v"), [(2, 4, 2), (4, 8, 2), (4, 16, 3), (8, 32, 2)])
def test_the_bubble_of_interleaved_stages(p: int, m: int, v: int) -> None:
    plan = plan_for("interleaved-1f1b", p, m, v)
    assert bubble(timeline(plan)) == pytest.approx((p - 1) / (v * m + p - 1))


def test_splitting_the_backward_pass_makes_the_bubble_smaller() -> None:
    shares = {schedule: bubble(timeline(plan_for(schedule, 4, 16))) for schedule in get_args(Schedule)}
    assert max(shares["zbv"], shares["interleaved-zero-bubble"]) < shares["interleaved-1f1b"] < shares["1f1b"]


def test_one_forward_one_backward_keeps_no_more_in_flight_than_there_are_stages_ahead() -> None:
    for rank, works in enumerate(order(plan_for("1f1b", 4, 12))):
        in_flight = most = 0
        for work in works:
            in_flight += 1 if work.kind == "F" else -1
            most = max(most, in_flight)
        assert most == 4 - rank


def test_work_waits_for_what_it_needs_and_for_the_message() -> None:
    spans = timeline(plan_for("gpipe", 2, 2), StageTimes(forward=1, input=2, weight=3, message=0.5))
    assert Span(1, Work("F", 1, 0), 1.5, 2.5) in spans
    assert Span(1, Work("B", 1, 0), 3.5, 8.5) in spans
    assert Span(0, Work("B", 0, 0), 9.0, 14.0) in spans
