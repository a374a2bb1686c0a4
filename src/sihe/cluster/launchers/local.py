"""Ranks as processes on this machine: started, watched, ended together and started again, within a budget.

A rank that dies or hangs ends the attempt; a slow one is reported. When the number of free slots changes, an elastic
job goes on with another number of ranks: after a failure at once, else from its next checkpoint.

Linux and macOS (without `/proc` a stopped process is seen by its heartbeat only); several machines are the work of
other launchers.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from sihe.cluster.capacity import FileCapacity
from sihe.cluster.errors import JobStopped, NotEnoughSlots, RanksLost
from sihe.cluster.launchers import stacks
from sihe.cluster.launchers.processes import STOPPING, RankProcesses
from sihe.cluster.launchers.rank import EXIT_LEFT
from sihe.cluster.ports import Capacity
from sihe.cluster.restarts import Failure, RestartBudget
from sihe.cluster.types import (
    JobEvent,
    ProcessJob,
    RankFailed,
    RankHung,
    RanksStarted,
    Restarting,
    RestartPolicy,
    StragglerSeen,
    WorkersChanged,
)
from sihe.cluster.watch import HangWatch, StragglerWatch
from sihe.core.clock import Clock, SystemClock
from sihe.core.errors import SiheError, UserError

_LOOK_S = 0.25  # between two looks at heartbeats, process states and slots
_SETTLE_S = 0.3  # one failure brings others, and the one that caused them need not be the first to end

_Ending = Literal["done", "left"]


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
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._capacity = capacity
        self._clock = clock or SystemClock()
        self._wake = threading.Event()
        self._stop_signal: int | None = None

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        """Runs `job` to its end; how many restarts it took. Raises as the port says."""
        report = on_event or _ignore
        capacity = self._capacity or (FileCapacity(job.capacity_file) if job.capacity_file else _no_limit)
        self._stop_signal = None
        self._wake.clear()
        restarts, size = 0, job.world_size
        with self._signals():
            budget = RestartBudget(job.log_dir / "restarts", job.name, policy, self._clock)
            while True:
                budget.open()
                with _excused(budget):
                    before, size = size, self._wait_for_slots(job, policy, capacity)
                    ending, error = self._attempt(job, before, size, capacity, report, on_tick or _nothing)
                    if not isinstance(ending, str):
                        report(ending)
                        if isinstance(error, UserError):  # a restart would not change it
                            raise error
                if ending == "done":
                    budget.excuse()
                    return restarts
                if ending == "left":
                    budget.excuse()
                    continue
                budget.charge(Failure(ending.rank, ending.reason, str(ending.log)))
                try:
                    budget.check()
                except RanksLost as lost:
                    raise lost from error
                restarts += 1
                delay_s = policy.delay_s(budget.used)
                report(Restarting(budget.used, policy.max_restarts, delay_s))
                self._wake.wait(delay_s)
                self._raise_if_stopped(job)

    def stop(self) -> None:
        """Asks `run`, in whatever thread it is, to stop every rank and raise `JobStopped`."""
        self._stop_signal = signal.SIGTERM
        self._wake.set()

    # ---- one attempt ----------------------------------------------------------------------------------------------

    def _attempt(
        self,
        job: ProcessJob,
        before: int,
        size: int,
        capacity: Capacity,
        report: Callable[[JobEvent], None],
        tick: Callable[[], None],
    ) -> tuple[_Ending | RankFailed | RankHung, SiheError | None]:
        """One life of all ranks: how it ended, and of a failure the error behind it, if it is one of ours."""
        ranks = RankProcesses(job, size)
        ending: _Ending | RankFailed | RankHung | None = None
        try:
            if size != before:
                report(WorkersChanged(ranks.attempt, before, size, capacity()))
            report(RanksStarted(ranks.attempt, ranks.pids, ranks.folder))
            lookout = _Lookout(job, ranks, capacity, report)
            while True:
                codes = ranks.codes()
                tick()
                ending = _ending(ranks, codes, lookout) or lookout.look(codes)
                if isinstance(ending, RankFailed) and None in codes.values():
                    self._wake.wait(_SETTLE_S)
                    ending = _ending(ranks, ranks.codes(), lookout)
                if isinstance(ending, RankHung):
                    stacks.collect(dict(enumerate(ranks.pids)), ranks.stacks, self._wake.wait)
                if ending is not None:
                    return ending, ranks.last_words(ending.rank) if isinstance(ending, RankFailed) else None
                self._raise_if_stopped(job)
                self._wake.wait(self._poll_s)
        finally:
            # A rank that hangs has no last words, and the others wait for it.
            last = signal.SIGKILL if isinstance(ending, RankHung) else self._stop_signal or signal.SIGTERM
            ranks.close(signal.Signals(last), self._grace_s)

    def _wait_for_slots(self, job: ProcessJob, policy: RestartPolicy, capacity: Capacity) -> int:
        """How many ranks start now. Raises `NotEnoughSlots` when for too long there were too few slots."""
        started_s = time.monotonic()
        while True:
            slots = capacity()
            size = job.largest_size(slots)
            if size is not None:
                return size
            waited_s = time.monotonic() - started_s
            if waited_s >= policy.capacity_timeout_s:
                needed = min(job.world_sizes or (job.world_size,))
                raise NotEnoughSlots(job.name, needed=needed, slots=slots or 0, waited_s=waited_s)
            self._wake.wait(_LOOK_S)
            self._raise_if_stopped(job)

    # ---- interruption ---------------------------------------------------------------------------------------------

    def _raise_if_stopped(self, job: ProcessJob) -> None:
        if self._stop_signal is not None:
            raise JobStopped(job.name, self._stop_signal)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Takes the stopping signals, where Python allows it (the main thread) and nobody chose to ignore them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(signum: int, _frame: FrameType | None) -> None:
            self._stop_signal = signum
            self._wake.set()

        taken = [signum for signum in STOPPING if signal.getsignal(signum) != signal.SIG_IGN]
        former = {signum: signal.signal(signum, on_signal) for signum in taken}
        try:
            yield
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)


class _Lookout:
    """Looks at the heartbeats of one attempt and at the slots, some times a second."""

    def __init__(
        self, job: ProcessJob, ranks: RankProcesses, capacity: Capacity, report: Callable[[JobEvent], None]
    ) -> None:
        self._job = job
        self._ranks = ranks
        self._capacity = capacity
        self._report = report
        size = len(ranks.pids)
        self._hangs = HangWatch(job.watch, size) if job.watch else None
        self._stragglers = StragglerWatch(job.watch, size) if job.watch else None
        self._looked_s = time.monotonic()
        self.wanted_leave = False

    def look(self, codes: dict[int, int | None]) -> RankHung | None:
        """Reports stragglers, asks the ranks to leave when another number could run; the hang, if there is one."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return None
        self._looked_s = now_s
        best = self._job.largest_size(self._capacity()) if self._job.world_sizes else None
        wants = best is not None and best != len(self._ranks.pids)
        self._ranks.board.want_leave(wants)
        self.wanted_leave |= wants
        if self._hangs is None or self._stragglers is None:
            return None
        pulses = self._ranks.board.read()
        for slow in self._stragglers.look(pulses):
            step, window = pulses[slow.rank].step, self._stragglers.window
            times = (slow.median_s, slow.others_median_s)
            self._report(StragglerSeen(self._ranks.attempt, slow.rank, step, window, *times))
        stopped = {rank for rank, pid in enumerate(self._ranks.pids) if stacks.is_stopped(pid)}
        ended = {rank for rank, code in codes.items() if code is not None}
        hang = self._hangs.look(now_s, pulses, stopped=stopped, ended=ended)
        if hang is None:
            return None
        ranks, pid = self._ranks, self._ranks.pids[hang.rank]
        state, files = stacks.state_of(pid), (ranks.stacks(hang.rank), ranks.log(hang.rank))
        return RankHung(ranks.attempt, hang.rank, pid, hang.seconds, hang.step, state, *files)


def _ending(ranks: RankProcesses, codes: dict[int, int | None], lookout: _Lookout) -> _Ending | RankFailed | None:
    """How the attempt ended, judged by the exit codes of its ranks; `None` while it goes on."""
    failed = {rank: code for rank, code in codes.items() if code not in (0, None, EXIT_LEFT) and code is not None}
    left = {rank: EXIT_LEFT for rank, code in codes.items() if code == EXIT_LEFT}
    if left and not lookout.wanted_leave:  # nobody asked: not for free, or it could go on for ever
        failed |= left
    if failed:
        return ranks.first_failure(failed)
    if any(code is None for code in codes.values()):
        return None
    return "left" if left else "done"


@contextmanager
def _excused(budget: RestartBudget) -> Iterator[None]:
    """An attempt that somebody stopped, or whose input was at fault, does not count against the budget."""
    try:
        yield
    except (JobStopped, NotEnoughSlots, KeyboardInterrupt, UserError):
        budget.excuse()
        raise


def _no_limit() -> None:
    """Nobody limits how many ranks run."""


def _ignore(_event: JobEvent) -> None:
    """Nobody listens."""


def _nothing() -> None:
    """Nothing to do between two looks at the ranks."""
