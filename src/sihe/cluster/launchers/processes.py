"""The processes of one attempt: started through torch elastic's process layer, with their logs, and ended together.

Each attempt gets a fresh key-value store on a fresh port, which the launcher hosts: ranks of an attempt can never meet
what a dead one left. (The restarts of torch elastic's own agent reuse the store; on gloo they failed with "connection
refused" to the dead attempt's port.) The store listens on loopback only.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stub
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, PContext, SubprocessContext, start_processes

from sihe.cluster.heartbeats import HEARTBEATS_FILE, HeartbeatBoard
from sihe.cluster.launchers import reports
from sihe.cluster.launchers.rank import ERROR_FILE, LAUNCHER_PID
from sihe.cluster.launchers.stacks import STACKS_FILE
from sihe.cluster.types import ProcessJob, RankFailed
from sihe.core.errors import SiheError, UserError
from sihe.core.files import disk_errors

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a launcher to stop its ranks."""
_LOOPBACK = "127.0.0.1"

# Failures are reported as events and errors; torch elastic's own log lines would repeat them on the terminal.
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


class RankProcesses:
    """`world_size` running ranks of `job`, as attempt number `attempt`. Raises `NoSpace`; `close` must be called."""

    def __init__(self, job: ProcessJob, world_size: int) -> None:
        self.attempt, self.folder = _new_attempt(job.log_dir)
        beats = self.folder / "heartbeats"
        self.board = HeartbeatBoard(beats, world_size)
        self._logs = _RankLogs(self.folder)
        self._store = _open_store()
        self._context = self._start(job, world_size, beats)
        pids = self._context.pids()
        self.pids = tuple(pids[rank] for rank in range(world_size))

    def codes(self) -> dict[int, int | None]:
        """The exit code of each rank; minus the signal's number for one that was killed, `None` for one that runs."""
        return {rank: handler.proc.poll() for rank, handler in self._context.subprocess_handlers.items()}

    def close(self, signum: signal.Signals, grace_s: float) -> None:
        """Ends the ranks that still run: with `signum`, and after `grace_s` with SIGKILL."""
        self._context.close(signum, timeout=int(grace_s))
        for handler in self._context.subprocess_handlers.values():
            # torch elastic closes the log files of the ranks that it stopped, not of those that ended by themselves.
            for log in (handler._stdout, handler._stderr):
                if log is not None:
                    log.close()
        self.board.close()

    def log(self, rank: int) -> Path:
        """The error output of a rank."""
        return self._logs.rank(rank) / "stderr.log"

    def stacks(self, rank: int) -> Path:
        """Where a rank writes its stacks when it is asked to."""
        return self._logs.rank(rank) / "stacks.log"

    def last_words(self, rank: int) -> SiheError | None:
        """The error with which a rank ended, when it is one of ours."""
        report = reports.read(_report_path(self._logs.rank(rank)))
        return report.error() if report else None

    def first_failure(self, failed: dict[int, int]) -> RankFailed:
        """Of the ranks that `failed` (with their codes), the one that caused the others' failures.

        An input error comes first, then a killed rank, then whoever reported first.
        """
        found = {rank: reports.read(_report_path(self._logs.rank(rank))) for rank in failed}

        def order(rank: int) -> tuple[bool, bool, int]:
            report = found[rank]
            is_input = report is not None and isinstance(report.error(), UserError)
            return not is_input, failed[rank] > 0, report.at_ns if report else 0

        rank = min(failed, key=order)
        code, report = failed[rank], found[rank]
        name = _signal_name(-code) if code < 0 else None
        reason = f"was killed by {name}" if name else f"exited with code {code}"
        if report and not name:
            reason = f"failed with {report.summary}"
        exit_code = code if code > 0 else None
        return RankFailed(self.attempt, rank, self.pids[rank], exit_code, name, reason, self.log(rank))

    def _start(self, job: ProcessJob, world_size: int, beats: Path) -> SubprocessContext:
        common = {
            "MASTER_ADDR": _LOOPBACK,
            "MASTER_PORT": str(self._store.port),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "TORCHELASTIC_RUN_ID": job.name,
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt - 1),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": str(job.threads_per_rank),
            LAUNCHER_PID: str(os.getpid()),
            HEARTBEATS_FILE: str(beats),
            **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
            **job.env,
        }
        ranks = range(world_size)
        with _keep_signal_handlers(), disk_errors(self.folder):
            context: PContext = start_processes(
                name=job.name,
                entrypoint=sys.executable,
                # -P: a file in the user's folder must not shadow a package that the rank imports.
                args=dict.fromkeys(ranks, ("-P", "-u", "-m", job.module, *job.args)),
                envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
                logs_specs=self._logs,
            )
        assert isinstance(context, SubprocessContext), "an entry point that is a command runs as subprocesses"
        return context


class _RankLogs(LogsSpecs):
    """Puts each rank's output, report and stacks into `<folder>/rank-<r>/`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(log_dir=str(folder))
        self.folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self.folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Creates the folders, reserves the reports, and tells each rank where its report and stacks go."""
        destination = LogsDest()
        for rank, env in envs.items():
            home = self.rank(rank)
            home.mkdir()
            report = _report_path(home)
            reports.reserve(report)
            env[ERROR_FILE] = str(report)
            env[STACKS_FILE] = str(home / "stacks.log")
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
    handled = (*STOPPING, signal.SIGQUIT)
    former = [(signum, signal.getsignal(signum)) for signum in handled]
    try:
        yield
    finally:
        for signum, handler in former:
            signal.signal(signum, handler)
