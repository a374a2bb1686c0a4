"""What goes wrong with jobs."""

from __future__ import annotations

import signal
from pathlib import Path

from sihe.core.errors import TransientError


class RanksLost(TransientError, ChildProcessError):
    """A rank died and the restart budget is spent. `rank` is the one that died first, `log` its error output."""

    def __init__(self, job: str, rank: int, reason: str, *, restarts: int, log: Path) -> None:
        super().__init__(
            f"job {job!r} gave up after {restarts} restarts: rank {rank} {reason}; see {log}, "
            "then run the same command again"
        )
        self.job = job
        self.rank = rank
        self.reason = reason
        self.restarts = restarts
        self.log = log


class JobStopped(TransientError, InterruptedError):
    """The job was asked to stop by `signum`, and every rank is gone."""

    def __init__(self, job: str, signum: int) -> None:
        super().__init__(f"job {job!r} was stopped by {signal.Signals(signum).name}: run the same command to go on")
        self.job = job
        self.signum = signum
