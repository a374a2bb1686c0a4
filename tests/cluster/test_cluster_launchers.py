"""Every launcher, with real processes: restarts, budgets, errors that arrive as themselves, and no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sihe.cluster.errors import JobStopped, NotEnoughSlots, RanksLost
from sihe.cluster.launchers.local import LocalLauncher
from sihe.cluster.launchers.ray.launcher import RayLauncher
from sihe.cluster.ports import Launcher
from sihe.cluster.types import (
    JobEvent,
    ProcessJob,
    RankFailed,
    RankHung,
    RanksStarted,
    Restarting,
    RestartPolicy,
    WatchPolicy,
    WorkersChanged,
)
from sihe.core.errors import CorruptData, NoSpace
from support.ray_cluster import RayNodes, ray_nodes
from support.training_runs import python_path

MakeLauncher = Callable[..., Launcher]
AT_ONCE = RestartPolicy(max_restarts=2, first_delay_s=0)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(3) as running:
        yield running


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def where(request: pytest.FixtureRequest) -> str:
    """Where ranks run: the address of a Ray cluster, or nothing for this machine."""
    if request.param == "local":
        return ""
    cluster: RayNodes = request.getfixturevalue("nodes")
    return cluster.address


@pytest.fixture
def make_launcher(where: str) -> MakeLauncher:
    """Makes a launcher of each kind."""

    def make(**settings: Any) -> Launcher:
        return RayLauncher(address=where, **settings) if where else LocalLauncher(**settings)

    return make


def job_of(fate: str, folder: Path, world_size: int = 2, **changes: Any) -> ProcessJob:
    job = ProcessJob(
        name=fate,
        module="support.ranks",
        args=(fate, str(folder)),
        world_size=world_size,
        log_dir=folder / "logs",
        env={"PYTHONPATH": python_path()},
    )
    return replace(job, **changes)


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_all_ranks_run_with_their_own_logs(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    events: list[JobEvent] = []
    ticks: list[int] = []
    restarts = make_launcher().run(
        job_of("ends", tmp_path), AT_ONCE, on_event=events.append, on_tick=lambda: ticks.append(1)
    )
    assert restarts == 0
    (started,) = events
    assert isinstance(started, RanksStarted)
    assert len(set(started.pids)) == 2
    assert ticks
    for rank in range(2):
        text = (tmp_path / "logs" / "attempt-001" / f"rank-{rank}" / "stdout.log").read_text()
        assert text == f"rank {rank} of 2 with 1 threads\n"


def test_a_killed_rank_restarts_all_of_them(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    events: list[JobEvent] = []
    assert make_launcher().run(job_of("killed-once", tmp_path), AT_ONCE, on_event=events.append) == 1
    first, failed, restarting, second = events
    assert isinstance(first, RanksStarted)
    assert isinstance(failed, RankFailed)
    assert (failed.rank, failed.signal, failed.pid) == (1, "SIGKILL", first.pids[1])
    assert isinstance(restarting, Restarting)
    assert isinstance(second, RanksStarted)
    assert second.attempt == 2
    assert not any(is_alive(pid) for pid in (*first.pids, *second.pids))


def test_a_restart_meets_on_a_fresh_store(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    assert make_launcher().run(job_of("sums", tmp_path), AT_ONCE) == 1
    assert (tmp_path / "sum-0").read_text() == (tmp_path / "sum-1").read_text() == "6.0"


def test_the_restart_budget_ends(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    events: list[JobEvent] = []
    with pytest.raises(RanksLost, match=r"gave up after 2 restarts.*SIGKILL") as caught:
        make_launcher().run(job_of("always-killed", tmp_path, 1), AT_ONCE, on_event=events.append)
    assert sum(isinstance(event, RanksStarted) for event in events) == 3
    assert caught.value.log.is_file()


def test_the_exit_code_of_a_rank_is_reported(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    events: list[JobEvent] = []
    with pytest.raises(RanksLost, match="exited with code 3"):
        make_launcher().run(job_of("exits-3", tmp_path, 1), RestartPolicy(max_restarts=0), on_event=events.append)
    assert [event.exit_code for event in events if isinstance(event, RankFailed)] == [3]


def test_an_exception_that_is_not_ours_is_quoted(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    with pytest.raises(RanksLost, match="KeyError: 'nothing named so'") as caught:
        make_launcher().run(job_of("bug", tmp_path, 1), RestartPolicy(max_restarts=0))
    assert "Traceback" in caught.value.log.read_text()


def test_an_input_error_arrives_as_itself_and_is_not_retried(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    events: list[JobEvent] = []
    with pytest.raises(CorruptData, match="3 bytes are missing") as caught:
        make_launcher().run(job_of("corrupt", tmp_path), AT_ONCE, on_event=events.append)
    assert caught.value.path == str(tmp_path / "shard-0.bin")
    assert sum(isinstance(event, RanksStarted) for event in events) == 1
    with pytest.raises(NoSpace, match="no space left"):
        make_launcher().run(job_of("disk-full", tmp_path), AT_ONCE)


def test_attempts_of_a_former_launcher_keep_their_logs(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    for attempt in (1, 2):
        make_launcher().run(job_of("ends", tmp_path, 1), AT_ONCE)
        assert (tmp_path / "logs" / f"attempt-{attempt:03d}" / "rank-0" / "stdout.log").stat().st_size > 0


def test_a_rank_that_ignores_signals_is_killed(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    events: list[JobEvent] = []
    with pytest.raises(RanksLost, match="code 3"):
        make_launcher(grace_s=1).run(job_of("deaf", tmp_path), RestartPolicy(max_restarts=0), on_event=events.append)
    assert isinstance(events[0], RanksStarted)
    assert not any(is_alive(pid) for pid in events[0].pids)


def test_stop_from_another_thread(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    launcher = make_launcher()
    caught: list[BaseException] = []
    pids: list[int] = []

    def on_event(event: JobEvent) -> None:
        assert isinstance(event, RanksStarted)
        pids.extend(event.pids)
        launcher.stop()

    def run() -> None:
        try:
            launcher.run(job_of("waits", tmp_path), AT_ONCE, on_event=on_event)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert isinstance(caught[0], JobStopped)
    assert not any(is_alive(pid) for pid in pids)


def test_an_error_in_the_caller_leaves_no_rank(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    events: list[JobEvent] = []

    def tick() -> None:
        raise NoSpace(tmp_path)

    with pytest.raises(NoSpace):
        make_launcher().run(job_of("waits", tmp_path), AT_ONCE, on_event=events.append, on_tick=tick)
    assert isinstance(events[0], RanksStarted)
    assert not any(is_alive(pid) for pid in events[0].pids)


LAUNCH = """
import signal
import sys
from pathlib import Path
from sihe.cluster.launchers.choice import chosen
from sihe.core.settings import ClusterSettings
from sihe.cluster.types import ProcessJob, RestartPolicy

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell inherit it ignored
folder = Path(sys.argv[1])
job = ProcessJob("waits", "support.ranks", 2, folder / "logs", ("waits", str(folder)), env={"PYTHONPATH": sys.argv[2]})
settings = ClusterSettings(launcher="ray", ray_address=sys.argv[3]) if sys.argv[3] else ClusterSettings()
print("ready", flush=True)
chosen(settings).run(job, RestartPolicy(), on_event=lambda event: print(*event.pids, flush=True))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_launcher(where: str, tmp_path: Path, signum: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(tmp_path), python_path(), where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stderr is not None
        assert launcher.stdout.readline() == "ready\n"
        pids = [int(pid) for pid in launcher.stdout.readline().split()]
        while not all((tmp_path / f"rank-{rank}.pid").exists() for rank in range(2)):
            assert launcher.poll() is None
        os.kill(launcher.pid, signum)
        errors = launcher.stderr.read()  # to its end: every process that held the pipe is gone
        launcher.wait(60)
    if signum == signal.SIGKILL:
        assert launcher.returncode == -signal.SIGKILL
        for pid in pids:  # the ranks die by the kernel's hand, a moment later
            while is_alive(pid):
                pass
    else:
        assert launcher.returncode == 1
        assert f"stopped by {signum.name}" in errors
        assert not any(is_alive(pid) for pid in pids)


def test_a_spent_budget_stays_spent(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    for _ in range(2):
        events: list[JobEvent] = []
        with pytest.raises(RanksLost, match=r"gave up after 2 restarts.*SIGKILL") as caught:
            make_launcher().run(job_of("always-killed", tmp_path, 1), AT_ONCE, on_event=events.append)
        assert caught.value.log.is_file()
    assert events == [], "another launcher starts nothing"
    with pytest.raises(RanksLost, match="gave up after 3 restarts"):
        make_launcher().run(job_of("always-killed", tmp_path, 1), replace(AT_ONCE, max_restarts=3))


# ---- hanging ------------------------------------------------------------------------------------------------------

IMPATIENT = WatchPolicy(hang_timeout_s=3.0, startup_timeout_s=200)  # longer than a busy machine takes to end a rank


@pytest.mark.parametrize("fate", ["stops-once", "gets-stuck-once"])
def test_a_hung_rank_is_shown_and_replaced(make_launcher: MakeLauncher, tmp_path: Path, fate: str) -> None:
    events: list[JobEvent] = []
    job = job_of(fate, tmp_path, watch=IMPATIENT)
    assert make_launcher().run(job, AT_ONCE, on_event=events.append) == 1
    started, hung, restarting, _ = events
    assert isinstance(started, RanksStarted)
    assert isinstance(hung, RankHung)
    assert isinstance(restarting, Restarting)
    assert (hung.rank, hung.step, hung.pid) == (1, 3, started.pids[1])
    assert hung.seconds >= IMPATIENT.hang_timeout_s
    assert not any(is_alive(pid) for pid in started.pids)
    own, other = (hung.stacks.read_text(), (hung.stacks.parents[1] / "rank-0" / "stacks.log").read_text())
    assert "wait_forever" in other, "the rank that waits shows where"
    if fate == "stops-once":
        assert hung.state == "T (stopped)"
        assert "it cannot answer" in own
    else:
        assert "wait_forever" in own
        assert "S (sleeping)" in own


def test_a_job_without_heartbeats_is_not_watched(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    launcher = make_launcher()
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) > 30:
            launcher.stop()

    with pytest.raises(JobStopped):
        launcher.run(job_of("waits", tmp_path), AT_ONCE, on_tick=tick)


# ---- elastic ------------------------------------------------------------------------------------------------------


def test_ranks_leave_for_another_number_and_it_costs_no_restart(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    slots = [2]
    events: list[JobEvent] = []

    def on_tick() -> None:
        if (tmp_path / "world-2").exists():
            slots[0] = 3

    job = job_of("leaves-when-asked", tmp_path, 4, world_sizes=(2, 3, 4))
    launcher = make_launcher(capacity=lambda: slots[0])
    policy = replace(AT_ONCE, max_restarts=0)
    assert launcher.run(job, policy, on_event=events.append, on_tick=on_tick) == 0
    changes = [(event.before, event.after) for event in events if isinstance(event, WorkersChanged)]
    assert changes == [(4, 2), (2, 3)]
    assert [len(event.pids) for event in events if isinstance(event, RanksStarted)] == [2, 3]
    assert not (tmp_path / "world-4").exists()


def test_who_leaves_unasked_uses_the_budget(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    with pytest.raises(RanksLost, match="exited with code 75"):
        make_launcher().run(job_of("leaves-unasked", tmp_path, 1), replace(AT_ONCE, max_restarts=0))


def test_too_few_slots(make_launcher: MakeLauncher, tmp_path: Path) -> None:
    (tmp_path / "workers").write_text("1")
    job = job_of("ends", tmp_path, 2, capacity_file=tmp_path / "workers")
    with pytest.raises(NotEnoughSlots, match=r"at least 2 workers.*room for 1"):
        make_launcher().run(job, replace(AT_ONCE, capacity_timeout_s=0))
    (tmp_path / "workers").unlink()
    assert make_launcher().run(job, AT_ONCE) == 0


def test_delays_grow_and_stay_bounded() -> None:
    policy = RestartPolicy(first_delay_s=0.5, factor=2, max_delay_s=3, jitter=0)
    assert [policy.delay_s(restart) for restart in (1, 2, 3, 4, 10_000)] == [0.5, 1, 2, 3, 3]
