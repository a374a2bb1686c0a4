"""Ranks as processes on this machine, started through torch elastic's process layer.

Each attempt gets a fresh key-value store on a fresh port, which the launcher hosts: ranks of an attempt can never meet
what a dead one left. (The restarts of torch elastic's own agent reuse the store; on gloo they failed with "connection
refused" to the dead attempt's port.) The store listens on loopback only.

Linux and macOS; several machines are the work of other launchers.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stub
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, PContext, SubprocessContext, start_processes

from sihe.cluster.errors import JobStopped, RanksLost
from sihe.cluster.launchers import reports
from sihe.cluster.launchers.rank import ERROR_FILE, LAUNCHER_PID
from sihe.cluster.types import JobEvent, ProcessJob, RankFailed, RanksStarted, Restarting, RestartPolicy
from sihe.core.errors import UserError
from sihe.core.files import disk_errors

_LOOPBACK = "127.0.0.1"
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Failures are reported as events and errors; torch elastic's own log lines would repeat them on the terminal.
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


class LocalLauncher:
    """Starts, watches and restarts the ranks of one job at a time (`sihe.cluster.ports.Launcher`).

    In the main thread it also takes SIGTERM, SIGINT and SIGHUP for the time of `run` and passes them on to the ranks.
    """

    def __init__(self, *, poll_s: float = 0.05, grace_s: float = 5.0) -> None:
        self._poll_s = poll_s
        self._grace_s = grace_s
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
        self._stop_signal = None
        self._wake.clear()
        with self._signals():
            for restarts in range(policy.max_restarts + 1):
                failure = self._attempt(job, report, on_tick or _nothing)
                if failure is None:
                    return restarts
                report(failure)
                self._raise_if_hopeless(job, failure, restarts, policy)
                delay_s = policy.delay_s(restarts + 1)
                report(Restarting(restarts + 1, policy.max_restarts, delay_s))
                self._wake.wait(delay_s)
                self._raise_if_stopped(job)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def stop(self) -> None:
        """Asks `run`, in whatever thread it is, to stop every rank and raise `JobStopped`."""
        self._stop_signal = signal.SIGTERM
        self._wake.set()

    # ---- one attempt ----------------------------------------------------------------------------------------------

    def _attempt(
        self, job: ProcessJob, report: Callable[[JobEvent], None], tick: Callable[[], None]
    ) -> RankFailed | None:
        """One life of all ranks: `None` when they all ended well, else the failure that came first."""
        attempt, folder = _new_attempt(job.log_dir)
        logs = _RankLogs(folder)
        store = _open_store()
        ranks = self._start(job, attempt, store.port, logs)
        try:
            pids = ranks.pids()
            report(RanksStarted(attempt, tuple(pids[rank] for rank in sorted(pids)), folder))
            while True:
                codes = {rank: handler.proc.poll() for rank, handler in ranks.subprocess_handlers.items()}
                tick()
                failed = {rank: code for rank, code in codes.items() if code}
                if failed:
                    return _first_failure(attempt, failed, pids, logs)
                if all(code == 0 for code in codes.values()):
                    return None
                self._raise_if_stopped(job)
                self._wake.wait(self._poll_s)
        finally:
            _close(ranks, signal.Signals(self._stop_signal or signal.SIGTERM), self._grace_s)

    def _start(self, job: ProcessJob, attempt: int, port: int, logs: _RankLogs) -> SubprocessContext:
        common = {
            "MASTER_ADDR": _LOOPBACK,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(job.world_size),
            "LOCAL_WORLD_SIZE": str(job.world_size),
            "TORCHELASTIC_RUN_ID": job.name,
            "TORCHELASTIC_RESTART_COUNT": str(attempt - 1),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": str(job.threads_per_rank),
            LAUNCHER_PID: str(os.getpid()),
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
            **job.env,
        }
        ranks = range(job.world_size)
        with _keep_signal_handlers(), disk_errors(logs.folder):
            context: PContext = start_processes(
                name=job.name,
                entrypoint=sys.executable,
                # -P: a file in the user's folder must not shadow a package that the rank imports.
                args=dict.fromkeys(ranks, ("-P", "-u", "-m", job.module, *job.args)),
                envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
                logs_specs=logs,
            )
        assert isinstance(context, SubprocessContext), "an entry point that is a command runs as subprocesses"
        return context

    # ---- failure and interruption ---------------------------------------------------------------------------------

    def _raise_if_hopeless(self, job: ProcessJob, failure: RankFailed, restarts: int, policy: RestartPolicy) -> None:
        """Raises what a restart would not change, or what the budget no longer allows to change."""
        last_words = reports.read(_report_path(failure.log.parent))
        error = last_words.error() if last_words else None
        if isinstance(error, UserError):
            raise error
        if restarts == policy.max_restarts:
            raise RanksLost(job.name, failure.rank, failure.reason, restarts=restarts, log=failure.log) from error

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

        taken = [signum for signum in _STOPPING if signal.getsignal(signum) != signal.SIG_IGN]
        former = {signum: signal.signal(signum, on_signal) for signum in taken}
        try:
            yield
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)


class _RankLogs(LogsSpecs):
    """Puts each rank's output and report into `<folder>/rank-<r>/`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(log_dir=str(folder))
        self.folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Creates the folders, reserves the reports, and tells each rank where its report goes."""
        destination = LogsDest()
        for rank, env in envs.items():
            home = self.rank(rank)
            home.mkdir()
            report = _report_path(home)
            reports.reserve(report)
            env[ERROR_FILE] = str(report)
            destination.stdouts[rank] = str(home / "stdout.log")
            destination.stderrs[rank] = str(home / "stderr.log")
            destination.error_files[rank] = str(report)
        return destination

    def rank(self, rank: int) -> Path:
        """The folder of one rank."""
        return self.folder / f"rank-{rank}"


def _report_path(rank_folder: Path) -> Path:
    return rank_folder / "error.json"


def _new_attempt(log_dir: Path) -> tuple[int, Path]:
    """The next attempt's number and its new folder; attempts of former launchers of the same job count."""
    with disk_errors(log_dir):
        log_dir.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.name.rpartition("-")[2]) for path in log_dir.glob("attempt-[0-9]*")]
        attempt = max(numbers, default=0) + 1
        folder = log_dir / f"attempt-{attempt:03d}"
        folder.mkdir()
    return attempt, folder


def _open_store() -> TCPStore:
    """A new key-value store on a free port of the loopback interface. It closes with the object."""
    listener = socket.create_server((_LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    return TCPStore(
        _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )


def _close(ranks: SubprocessContext, signum: signal.Signals, grace_s: float) -> None:
    """Ends the ranks that still run: with `signum`, and after `grace_s` with SIGKILL."""
    ranks.close(signum, timeout=int(grace_s))
    for handler in ranks.subprocess_handlers.values():
        # torch elastic closes the log files of the ranks that it stopped, not of those that ended by themselves.
        for log in (handler._stdout, handler._stderr):
            if log is not None:
                log.close()


def _first_failure(attempt: int, failed: dict[int, int], pids: dict[int, int], logs: _RankLogs) -> RankFailed:
    """The failure that caused the others: an input error, then a killed rank, then whoever reported first."""
    found = {rank: reports.read(_report_path(logs.rank(rank))) for rank in failed}

    def order(rank: int) -> tuple[bool, bool, int]:
        report = found[rank]
        return not (report and isinstance(report.error(), UserError)), failed[rank] > 0, report.at_ns if report else 0

    rank = min(failed, key=order)
    code, report = failed[rank], found[rank]
    name = _signal_name(-code) if code < 0 else None
    reason = (
        f"was killed by {name}" if name else f"failed with {report.summary}" if report else f"exited with code {code}"
    )
    log = logs.rank(rank) / "stderr.log"
    return RankFailed(attempt, rank, pids[rank], code if code > 0 else None, name, reason, log)


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal has a number only
        return f"signal {signum}"


@contextmanager
def _keep_signal_handlers() -> Iterator[None]:
    """Undoes the signal handlers that torch elastic installs when it starts processes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = (*_STOPPING, signal.SIGQUIT)
    former = [(signum, signal.getsignal(signum)) for signum in handled]
    try:
        yield
    finally:
        for signum, handler in former:
            signal.signal(signum, handler)


def _ignore(_event: JobEvent) -> None:
    """Nobody listens."""


def _nothing() -> None:
    """Nothing to do between two looks at the ranks."""
