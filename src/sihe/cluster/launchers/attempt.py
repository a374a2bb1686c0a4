"""The seam between the supervisor, which decides, and the places where ranks run: this machine, or a Ray cluster."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Protocol

from sihe.cluster.heartbeats import Pulse
from sihe.cluster.launchers.folder import AttemptFolder
from sihe.cluster.types import ProcessJob

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a launcher to stop its ranks."""

Pause = Callable[[float], None]
"""Waits so many seconds, or raises `JobStopped` as soon as somebody asks the job to stop."""


class SlotsTaken(Exception):
    """The slots that were free a moment ago are not: others took them, or their node was lost."""


class Attempt(Protocol):
    """All ranks of one attempt, from their start to `close`. Every method returns soon."""

    folder: AttemptFolder
    pids: tuple[int, ...]
    """The process of each rank, on its machine."""
    hosts: tuple[str, ...]
    """The address of each rank's machine; empty when all run on this one."""

    def codes(self) -> dict[int, int | str | None]:
        """How each rank ended, `None` for one that runs.

        It is the exit code, minus the signal's number for a rank that was killed, and words for one that was lost and
        has no code, such as "was lost with its node".
        """
        ...

    def pulses(self) -> tuple[Pulse, ...]:
        """The newest heartbeats, by rank."""
        ...

    def want_leave(self, wanted: bool) -> None:
        """Asks the ranks to leave after the next checkpoint, or takes that back."""
        ...

    def stopped(self) -> set[int]:
        """The ranks whose process a signal has stopped."""
        ...

    def state(self, rank: int) -> str:
        """The state of a rank's process in its system's words, such as "T (stopped)"."""
        ...

    def show_stacks(self, wait: Callable[[float], object]) -> None:
        """Has every rank that can write its stacks into the folder; `wait(s)` passes the time until they have."""
        ...

    def close(self, signum: signal.Signals, grace_s: float) -> None:
        """Ends the ranks that still run: with `signum`, and after `grace_s` with SIGKILL. Frees everything."""
        ...


Start = Callable[[ProcessJob, int, Pause], Attempt]
"""Starts so many ranks of a job. Raises `SlotsTaken`, `JobStopped` out of the pause, and `UserError`s."""
