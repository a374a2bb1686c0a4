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


class FolderNotShared(UserError, FileNotFoundError):
    """The machine at `node` does not see the folder `path`, which all machines of a job share."""

    def __init__(self, path: Path, node: str) -> None:
        super().__init__(
            f"node {node} of the Ray cluster does not see {path}: put the home folder on storage that every node "
            "mounts at the same path (NFS or the like) with SIHE_HOME, then run the same command again"
        )
        self.path = str(path)
        self.node = node


class NodeUnfit(UserError, RuntimeError):
    """A machine of the cluster cannot run ranks, for `reason`. `node` is its address, where it is known."""

    def __init__(self, node: str | None, reason: str) -> None:
        super().__init__(
            f"{f'node {node}' if node else 'a node'} of the Ray cluster cannot run ranks ({reason}): every node "
            "needs the same versions of Python, Ray and Sihe"
        )
        self.node = node
        self.reason = reason
