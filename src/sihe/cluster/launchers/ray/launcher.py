"""Ranks on the nodes of a Ray cluster: placed as one group, supervised from here as the ranks of one machine are.

The folder of the job (logs, checkpoints) must lie on storage that all nodes share. When a node is lost, the next
attempt takes the slots that are left, if the job can run with fewer; when one joins, an elastic job grows from its
next checkpoint. The cluster's autoscaler is not asked for more nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from sihe.cluster.capacity import job_capacity
from sihe.cluster.launchers.attempt import Pause
from sihe.cluster.launchers.ray.connection import connected
from sihe.cluster.launchers.supervisor import Supervisor
from sihe.cluster.ports import Capacity
from sihe.cluster.types import JobEvent, ProcessJob, RestartPolicy
from sihe.core.clock import Clock

Placement = Literal["pack", "spread"]


class RayLauncher:
    """Starts, watches and restarts the ranks of one job at a time (`sihe.cluster.ports.Launcher`), on Ray.

    `address` is `host:port` of the cluster, or "auto" for the one to which this machine belongs. `placement` says
    whether the ranks share as few nodes as possible or as many. Each takes `threads_per_rank` CPUs and
    `gpus_per_rank` GPUs of the job. `capacity` is a limit beside the cluster's slots; by default the job's
    `capacity_file` is. In the main thread `run` also takes SIGTERM, SIGINT and SIGHUP and passes them on to the ranks.
    """

    def __init__(
        self,
        *,
        address: str = "auto",
        placement: Placement = "pack",
        poll_s: float = 0.05,
        grace_s: float = 5.0,
        capacity: Capacity | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._address = address
        self._placement = placement
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
        """Runs `job` to its end; how many restarts it took.

        Raises as the port says, and `MissingExtra`, `Unreachable`, `FolderNotShared`, `NodeUnfit`.
        """
        with connected(self._address):
            from sihe.cluster.launchers.ray.ranks import RayRanks
            from sihe.cluster.launchers.ray.slots import RaySlots

            slots = RaySlots({"CPU": job.threads_per_rank, "GPU": job.gpus_per_rank})
            limit = self._capacity or job_capacity(job)

            def start(job: ProcessJob, size: int, pause: Pause) -> RayRanks:
                return RayRanks(job, size, pause, slots, self._placement)

            def capacity() -> int:
                allowed, there = limit(), slots()
                return there if allowed is None else min(allowed, there)

            return self._supervisor.run(job, policy, start, capacity, on_event=on_event, on_tick=on_tick)

    def stop(self) -> None:
        """Asks `run`, in whatever thread it is, to stop every rank and raise `JobStopped`."""
        self._supervisor.stop()
