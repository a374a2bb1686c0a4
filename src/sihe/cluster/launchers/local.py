"""Ranks as processes on this machine.

Linux and macOS (without `/proc` a stopped process is seen by its heartbeat only); several machines are the work of
other launchers.
"""

from __future__ import annotations

from collections.abc import Callable

from sihe.cluster.capacity import job_capacity
from sihe.cluster.launchers.attempt import Pause
from sihe.cluster.launchers.processes import RankProcesses
from sihe.cluster.launchers.supervisor import Supervisor
from sihe.cluster.ports import Capacity
from sihe.cluster.types import JobEvent, ProcessJob, RestartPolicy
from sihe.core.clock import Clock


class LocalLauncher:
    """Starts, watches and restarts the ranks of one job at a time (`sihe.cluster.ports.Launcher`).

    `capacity` says how many ranks may run now; by default the job's `capacity_file` does. In the main thread `run`
    also takes SIGTERM, SIGINT and SIGHUP and passes them on to the ranks.
    """

    def __init__(
        self,
        *,
        poll_s: float = 0.05,
        grace_s: float = 5.0,
        capacity: Capacity | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._supervisor = Supervisor(poll_s=poll_s, grace_s=grace_s, clock=clock)
        self._capacity = capacity

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        """Runs `job` to its end; how many restarts it took. Raises as the port says."""
        capacity = self._capacity or job_capacity(job)
        return self._supervisor.run(job, policy, _start, capacity, on_event=on_event, on_tick=on_tick)

    def stop(self) -> None:
        """Asks `run`, in whatever thread it is, to stop every rank and raise `JobStopped`."""
        self._supervisor.stop()


def _start(job: ProcessJob, size: int, _pause: Pause) -> RankProcesses:
    return RankProcesses(job, size)
