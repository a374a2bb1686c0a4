"""What goes wrong with jobs."""

from __future__ import annotations

import signal
from pathlib import Path

from sihe.core.errors import TransientError, UserError


class RanksLost(UserError, ChildProcessError):
    """The restart budget is spent. `rank` is the one that failed last, `log` its error output.

    The budget belongs to the job, not to a call: the same call fails at once.
    """

    def __init__(self, job: str, rank: int, reason: str, *, restarts: int, log: Path) -> None:
        super().__init__(
            f"job {job!r} gave up after {restarts} restarts: rank {rank} {reason}; see {log}. "
            f"Find the cause, then run the same command with max_restarts above {restarts}"
        )
        self.job = job
        self.rank = rank
        self.reason = reason
        self.restarts = restarts
        self.log = log


class NotEnoughSlots(TransientError, TimeoutError):
    """Fewer slots are free than the job needs at least, and that did not change for `waited_s`."""

    def __init__(self, job: str, *, needed: int, slots: int, waited_s: float) -> None:
        super().__init__(
            f"job {job!r} needs at least {needed} workers, and for {waited_s:.0f} s there was room for {slots}: "
            "run the same command when there is more, or allow fewer (min_workers)"
        )
        self.job = job
        self.needed = needed
        self.slots = slots
        self.waited_s = waited_s


class JobStopped(TransientError, InterruptedError):
    """The job was asked to stop by `signum`, and every rank is gone."""

    def __init__(self, job: str, signum: int) -> None:
        super().__init__(f"job {job!r} was stopped by {signal.Signals(signum).name}: run the same command to go on")
        self.job = job
        self.signum = signum
