"""What the supervisor does about slots that go, and whom it holds responsible, apart from any launcher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sihe.cluster.errors import NotEnoughSlots
from sihe.cluster.launchers import reports
from sihe.cluster.launchers.attempt import Attempt, Pause, SlotsTaken
from sihe.cluster.launchers.folder import AttemptFolder
from sihe.cluster.launchers.processes import RankProcesses
from sihe.cluster.launchers.supervisor import Supervisor
from sihe.cluster.types import JobEvent, ProcessJob, RanksStarted, RestartPolicy
from sihe.core.errors import CorruptData
from support.training_runs import python_path

POLICY = RestartPolicy(max_restarts=0, first_delay_s=0)


def job_of(folder: Path) -> ProcessJob:
    env = {"PYTHONPATH": python_path()}
    return ProcessJob("ends", "support.ranks", 1, folder / "logs", ("ends", str(folder)), env=env)


def test_slots_that_others_took_cost_no_restart(tmp_path: Path) -> None:
    tries: list[int] = []
    events: list[JobEvent] = []

    def start(job: ProcessJob, size: int, pause: Pause) -> Attempt:
        tries.append(size)
        if len(tries) < 3:
            raise SlotsTaken
        return RankProcesses(job, size)

    assert Supervisor().run(job_of(tmp_path), POLICY, start, lambda: 1, on_event=events.append) == 0
    assert tries == [1, 1, 1]
    (started,) = events
    assert isinstance(started, RanksStarted)
    assert started.attempt == 1


def test_slots_that_always_go_end_the_job(tmp_path: Path) -> None:
    def start(job: ProcessJob, size: int, pause: Pause) -> Attempt:
        raise SlotsTaken

    impatient = replace(POLICY, capacity_timeout_s=0)
    with pytest.raises(NotEnoughSlots):
        Supervisor().run(job_of(tmp_path), impatient, start, lambda: 1)
    # It was nobody's failure: the budget of no restart at all is still there.
    assert Supervisor().run(job_of(tmp_path), impatient, lambda job, size, _: RankProcesses(job, size), lambda: 1) == 0


def test_the_cause_of_a_failure(tmp_path: Path) -> None:
    """A lost rank comes before a killed one, that one before those that say why they failed, bad input before all."""
    folder = AttemptFolder(tmp_path)
    for rank in range(4):
        folder.prepare(rank)
    pids = (10, 11, 12, 13)
    reports.write(folder.report(0), RuntimeError("connection closed by peer"))
    reports.write(folder.report(3), CorruptData("shard-0.bin", "3 bytes are missing"))
    lost = folder.first_failure({0: 1, 1: -9, 2: "was lost with its node"}, pids)
    assert (lost.rank, lost.pid, lost.reason) == (2, 12, "was lost with its node")
    assert lost.exit_code is lost.signal is None
    killed = folder.first_failure({0: 1, 1: -9}, pids)
    assert (killed.rank, killed.signal, killed.reason) == (1, "SIGKILL", "was killed by SIGKILL")
    assert folder.first_failure({0: 1}, pids).reason == "failed with RuntimeError: connection closed by peer"
    assert folder.first_failure({0: 1, 1: -9, 2: "was lost with its node", 3: 1}, pids).rank == 3
