"""Jobs run one at a time, end in a state that says how, and are forgotten in order."""

from __future__ import annotations

import threading

import pytest

from sihe.console.jobs import Jobs, Report
from sihe.core.clock import FakeClock
from sihe.core.errors import InvalidInput, NotFound


def test_a_job_that_succeeds_and_ones_that_fail() -> None:
    jobs: Jobs[int] = Jobs(FakeClock())
    good = jobs.start("lab", lambda _: 7)

    def refuse(_: object) -> int:
        raise InvalidInput("not like this")

    def break_down(_: object) -> int:
        raise RuntimeError("a secret path")

    bad, broken = jobs.start("lab", refuse), jobs.start("lab", break_down)
    for job in (good, bad, broken):
        assert job.finished.wait(10)
    assert (good.state, good.result) == ("done", 7)
    assert (bad.state, bad.error) == ("failed", "not like this")
    assert (broken.state, broken.error) == ("failed", "RuntimeError")


def test_one_at_a_time_and_elapsed_counts_from_its_own_begin() -> None:
    clock = FakeClock()
    jobs: Jobs[None] = Jobs(clock)
    entered, leave = threading.Event(), threading.Event()

    def hold(report: Report) -> None:
        report(3, 4)
        entered.set()
        assert leave.wait(10)

    first = jobs.start("a", hold)
    assert entered.wait(10)
    assert (first.done, first.total) == (3, 4)
    second = jobs.start("b", lambda _: None)
    clock.advance(5)
    assert second.state == "waiting"
    assert (jobs.elapsed_s(first), jobs.elapsed_s(second)) == (5, 0)
    leave.set()
    assert second.finished.wait(10)
    assert second.state == "done"


def test_old_jobs_are_forgotten() -> None:
    jobs: Jobs[int] = Jobs(FakeClock())
    started = [jobs.start("lab", lambda _: 1) for _ in range(60)]
    assert jobs.get(started[-1].id) is started[-1]
    with pytest.raises(NotFound, match="start it again"):
        jobs.get(started[0].id)
    for job in started:
        assert job.finished.wait(10)
