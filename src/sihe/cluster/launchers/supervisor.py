"""The supervisor of a job: starts its ranks, watches them, ends them together and starts them again, within a budget.

A rank that dies or hangs ends the attempt; a slow one is reported. When the number of free slots changes, an elastic
job goes on with another number of ranks: after a failure at once, else from its next checkpoint. Where the ranks run
is the work of an `Attempt`; every launcher hands in its own.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from sihe.cluster.errors import JobStopped, NotEnoughSlots, RanksLost
from sihe.cluster.launchers.attempt import STOPPING, Attempt, SlotsTaken, Start
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


class Supervisor:
    """Runs one job at a time to its end. In the main thread it also takes SIGTERM, SIGINT and SIGHUP for the ranks."""

    def __init__(self, *, poll_s: float = 0.05, grace_s: float = 5.0, clock: Clock | None = None) -> None:
        self._poll_s = poll_s
        self._grace_s = grace_s
        self._clock = clock or SystemClock()
        self._wake = threading.Event()
        self._stop_signal: int | None = None

    def run(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        start: Start,
        capacity: Capacity,
        *,
        on_event: Callable[[JobEvent], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> int:
        """Runs `job` to its end; how many restarts it took. Raises as `sihe.cluster.ports.Launcher.run`.

        `start` starts the ranks of an attempt, `capacity` says how many may run now.
        """
        report = on_event or _ignore
        self._stop_signal = None
        self._wake.clear()
        restarts, size = 0, job.world_size
        with self._signals():
            budget = RestartBudget(job.log_dir / "restarts", job.name, policy, self._clock)
            while True:
                budget.open()
                with _excused(budget):
                    before, ranks = size, self._start(job, policy, start, capacity)
                    size = len(ranks.pids)
                    ending, error = self._attempt(job, ranks, before, capacity, report, on_tick or _nothing)
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
                self._pause(job, delay_s)

    def stop(self) -> None:
        """Asks `run`, in whatever thread it is, to stop every rank and raise `JobStopped`."""
        self._stop_signal = signal.SIGTERM
        self._wake.set()

    # ---- one attempt ----------------------------------------------------------------------------------------------

    def _start(self, job: ProcessJob, policy: RestartPolicy, start: Start, capacity: Capacity) -> Attempt:
        """Starts as many ranks as may run now. Raises `NotEnoughSlots` when for too long there were too few slots."""
        started_s = time.monotonic()
        while True:
            slots = capacity()
            size = job.largest_size(slots)
            if size is not None:
                try:
                    return start(job, size, lambda seconds: self._pause(job, seconds))
                except SlotsTaken:
                    slots = capacity()
            waited_s = time.monotonic() - started_s
            if waited_s >= policy.capacity_timeout_s:
                needed = min(job.world_sizes or (job.world_size,))
                raise NotEnoughSlots(job.name, needed=needed, slots=slots or 0, waited_s=waited_s)
            self._pause(job, _LOOK_S)

    def _attempt(
        self,
        job: ProcessJob,
        ranks: Attempt,
        before: int,
        capacity: Capacity,
        report: Callable[[JobEvent], None],
        tick: Callable[[], None],
    ) -> tuple[_Ending | RankFailed | RankHung, SiheError | None]:
        """One life of all ranks: how it ended, and of a failure the error behind it, if it is one of ours."""
        ending: _Ending | RankFailed | RankHung | None = None
        folder, size = ranks.folder, len(ranks.pids)
        try:
            if size != before:
                report(WorkersChanged(folder.number, before, size, capacity()))
            report(RanksStarted(folder.number, ranks.pids, folder.path, ranks.hosts))
            lookout = _Lookout(job, ranks, capacity, report)
            while True:
                codes = ranks.codes()
                tick()
                ending = _ending(ranks, codes, lookout) or lookout.look(codes)
                if isinstance(ending, RankFailed) and None in codes.values():
                    self._wake.wait(_SETTLE_S)
                    ending = _ending(ranks, ranks.codes(), lookout)
                if isinstance(ending, RankHung):
                    ranks.show_stacks(self._wake.wait)
                if ending is not None:
                    return ending, folder.last_words(ending.rank) if isinstance(ending, RankFailed) else None
                self._raise_if_stopped(job)
                self._wake.wait(self._poll_s)
        finally:
            # A rank that hangs has no last words, and the others wait for it.
            last = signal.SIGKILL if isinstance(ending, RankHung) else self._stop_signal or signal.SIGTERM
            ranks.close(signal.Signals(last), self._grace_s)

    # ---- interruption ---------------------------------------------------------------------------------------------

    def _pause(self, job: ProcessJob, seconds: float) -> None:
        """Waits so long, or raises `JobStopped`."""
        self._wake.wait(seconds)
        self._raise_if_stopped(job)

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

    def __init__(self, job: ProcessJob, ranks: Attempt, capacity: Capacity, report: Callable[[JobEvent], None]) -> None:
        self._job = job
        self._ranks = ranks
        self._capacity = capacity
        self._report = report
        size = len(ranks.pids)
        self._hangs = HangWatch(job.watch, size) if job.watch else None
        self._stragglers = StragglerWatch(job.watch, size) if job.watch else None
        self._looked_s = time.monotonic()
        self.wanted_leave = False

    def look(self, codes: dict[int, int | str | None]) -> RankHung | None:
        """Reports stragglers, asks the ranks to leave when another number could run; the hang, if there is one."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return None
        self._looked_s = now_s
        best = self._job.largest_size(self._capacity()) if len(self._job.world_sizes) > 1 else None
        wants = best is not None and best != len(self._ranks.pids)
        self._ranks.want_leave(wants)
        self.wanted_leave |= wants
        if self._hangs is None or self._stragglers is None:
            return None
        ranks, attempt = self._ranks, self._ranks.folder.number
        pulses = ranks.pulses()
        for slow in self._stragglers.look(pulses):
            step, window = pulses[slow.rank].step, self._stragglers.window
            self._report(StragglerSeen(attempt, slow.rank, step, window, slow.median_s, slow.others_median_s))
        ended = {rank for rank, code in codes.items() if code is not None}
        hang = self._hangs.look(now_s, pulses, stopped=ranks.stopped(), ended=ended)
        if hang is None:
            return None
        files = (ranks.folder.stacks(hang.rank), ranks.folder.log(hang.rank))
        pid, state = ranks.pids[hang.rank], ranks.state(hang.rank)
        return RankHung(attempt, hang.rank, pid, hang.seconds, hang.step, state, *files)


def _ending(ranks: Attempt, codes: dict[int, int | str | None], lookout: _Lookout) -> _Ending | RankFailed | None:
    """How the attempt ended, judged by how its ranks did; `None` while it goes on."""
    failed = {rank: code for rank, code in codes.items() if code not in (0, None, EXIT_LEFT) and code is not None}
    left = {rank: EXIT_LEFT for rank, code in codes.items() if code == EXIT_LEFT}
    if left and not lookout.wanted_leave:  # nobody asked: not for free, or it could go on for ever
        failed |= left
    if failed:
        return ranks.folder.first_failure(failed, ranks.pids)
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


def _ignore(_event: JobEvent) -> None:
    """Nobody listens."""


def _nothing() -> None:
    """Nothing to do between two looks at the ranks."""
