"""What rooms above may ask of a launcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sihe.cluster.types import JobEvent, ProcessJob, RestartPolicy

Capacity = Callable[[], int | None]
"""How many ranks may run now; `None` for no limit."""


class Launcher(Protocol):
    """Starts the ranks of a job, watches them, restarts them all when one dies or hangs."""

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        """Runs `job` to its end; how many restarts it took.

        `on_tick` is called some times a second, in the caller's thread. Raises a rank's own `UserError`, `RanksLost`
        when the budget of `policy` is spent, `NotEnoughSlots` and `JobStopped`. No rank outlives the call.
        """
        ...

    def stop(self) -> None:
        """Asks `run`, in whatever thread it is, to stop every rank and raise `JobStopped`."""
        ...
