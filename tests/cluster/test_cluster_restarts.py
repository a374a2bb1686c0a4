"""The budget of restarts: what counts, what does not, and that nothing refills it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sihe.cluster.errors import RanksLost
from sihe.cluster.restarts import Failure, RestartBudget
from sihe.cluster.types import MAX_RESTARTS, ProcessJob, RestartPolicy
from sihe.core.clock import FakeClock
from sihe.core.errors import CorruptData, InvalidInput

KILLED = Failure(1, "was killed by SIGKILL", "/logs/attempt-001/rank-1/stderr.log")


def budget_at(path: Path, clock: FakeClock | None = None, **policy: float) -> RestartBudget:
    return RestartBudget(path, "job", RestartPolicy(**{"max_restarts": 1, **policy}), clock or FakeClock())


def test_failures_count_over_launchers(tmp_path: Path) -> None:
    budget = budget_at(tmp_path / "restarts")
    budget.open()
    budget.charge(KILLED)
    budget = budget_at(tmp_path / "restarts")
    assert budget.used == 1
    budget.open()
    budget.charge(KILLED)
    for call in (budget.open, budget_at(tmp_path / "restarts").open):
        with pytest.raises(
            RanksLost, match=r"gave up after 1 restarts: rank 1 was killed by SIGKILL; see /logs"
        ) as error:
            call()
        assert error.value.log == Path(KILLED.log)
    budget_at(tmp_path / "restarts", max_restarts=2).open()


def test_an_attempt_that_its_launcher_did_not_survive_counts(tmp_path: Path) -> None:
    for used in range(2):
        budget = budget_at(tmp_path / "restarts")
        assert budget.used == used
        budget.open()
    with pytest.raises(RanksLost, match="lost together with its supervisor"):
        budget_at(tmp_path / "restarts").open()


def test_what_is_nobodys_failure_does_not_count(tmp_path: Path) -> None:
    for _ in range(5):
        budget = budget_at(tmp_path / "restarts", max_restarts=0)
        budget.open()
        budget.excuse()
    assert budget.used == 0


def test_a_budget_for_a_stretch_of_time(tmp_path: Path) -> None:
    clock = FakeClock()
    budget = budget_at(tmp_path / "restarts", clock, window_s=3600)
    for _ in range(2):
        budget.charge(KILLED)
        clock.advance(1200)
    with pytest.raises(RanksLost):
        budget.check()
    clock.advance(1200)
    assert budget.used == 1
    budget.open()


def test_the_file_holds_the_largest_budget_in_place(tmp_path: Path) -> None:
    budget = budget_at(tmp_path / "restarts", max_restarts=MAX_RESTARTS)
    size = (tmp_path / "restarts").stat().st_size
    for _ in range(MAX_RESTARTS + 1):
        budget._book.failed_at.append(2_000_000_000)
    budget.charge(Failure(0, "reason " * 1000, "log"))
    assert (tmp_path / "restarts").stat().st_size == size
    with pytest.raises(RanksLost):
        budget_at(tmp_path / "restarts", max_restarts=MAX_RESTARTS).open()


def test_a_file_that_counts_nothing(tmp_path: Path) -> None:
    (tmp_path / "restarts").write_text("[")
    with pytest.raises(CorruptData, match="whole budget"):
        budget_at(tmp_path / "restarts")


def test_delays_are_spread_and_repeatable() -> None:
    one, other = (RestartPolicy(first_delay_s=1, jitter=0.5, seed=seed) for seed in (1, 2))
    delays = [one.delay_s(restart) for restart in range(1, 30)]
    assert delays == [one.delay_s(restart) for restart in range(1, 30)]
    assert delays != [other.delay_s(restart) for restart in range(1, 30)]
    full = [min(30.0, 2.0**restart) for restart in range(29)]
    assert all(0.5 * most <= delay <= most for delay, most in zip(delays, full, strict=True))
    assert len({delay / most for delay, most in zip(delays, full, strict=True)}) == 29


@pytest.mark.parametrize(
    "bad", [{"max_restarts": MAX_RESTARTS + 1}, {"jitter": 1.5}, {"window_s": 0}, {"capacity_timeout_s": -1}]
)
def test_policies_check_themselves(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        RestartPolicy(**bad)  # type: ignore[arg-type]  # wrong on purpose


def test_the_largest_size_that_fits(tmp_path: Path) -> None:
    job = ProcessJob("job", "module", 4, tmp_path, world_sizes=(2, 3, 4, 6))
    assert [job.largest_size(slots) for slots in (None, 9, 5, 4, 2, 1)] == [6, 6, 4, 4, 2, None]
    assert [ProcessJob("job", "module", 4, tmp_path).largest_size(slots) for slots in (None, 4, 3)] == [4, 4, None]
    with pytest.raises(InvalidInput, match="world_sizes"):
        ProcessJob("job", "module", 4, tmp_path, world_sizes=(0,))
