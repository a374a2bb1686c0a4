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
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not listed in its stub
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, PContext, SubprocessContext, start_processes

from sihe.cluster.heartbeats import HEARTBEATS_FILE, HeartbeatBoard, Pulse
from sihe.cluster.launchers import stacks
from sihe.cluster.launchers.attempt import STOPPING
from sihe.cluster.launchers.environment import arguments, variables
from sihe.cluster.launchers.folder import AttemptFolder
from sihe.cluster.launchers.rank import LAUNCHER_PID
from sihe.cluster.types import ProcessJob
from sihe.core.files import disk_errors

_LOOPBACK = "127.0.0.1"

# Failures are reported as events and errors; torch elastic's own log lines would repeat them on the terminal.
logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


class RankProcesses:
    """`world_size` running ranks of `job` on this machine (`sihe.cluster.launchers.attempt.Attempt`).

    Raises `NoSpace`; `close` must be called.
    """

    def __init__(self, job: ProcessJob, world_size: int) -> None:
        self.folder = AttemptFolder(job.log_dir)
        self.hosts: tuple[str, ...] = ()
        self._board = HeartbeatBoard(self.folder.path / "heartbeats", world_size)
        self._store = _open_store()
        self._context = self._start(job, world_size)
        pids = self._context.pids()
        self.pids = tuple(pids[rank] for rank in range(world_size))

    def codes(self) -> dict[int, int | str | None]:
        """The exit code of each rank; minus the signal's number for one that was killed, `None` for one that runs."""
        return {rank: handler.proc.poll() for rank, handler in self._context.subprocess_handlers.items()}

    def pulses(self) -> tuple[Pulse, ...]:
        """The newest heartbeats, by rank."""
        return self._board.read()

    def want_leave(self, wanted: bool) -> None:
        """Asks the ranks to leave after the next checkpoint, or takes that back."""
        self._board.want_leave(wanted)

    def stopped(self) -> set[int]:
        """The ranks whose process a signal has stopped."""
        return {rank for rank, pid in enumerate(self.pids) if stacks.is_stopped(pid)}

    def state(self, rank: int) -> str:
        """The state of a rank's process."""
        return stacks.state_of(self.pids[rank])

    def show_stacks(self, wait: Callable[[float], object]) -> None:
        """Has every rank that can write its stacks into the folder."""
        stacks.collect(dict(enumerate(self.pids)), self.folder.stacks, wait)

    def close(self, signum: signal.Signals, grace_s: float) -> None:
        """Ends the ranks that still run: with `signum`, and after `grace_s` with SIGKILL."""
        self._context.close(signum, timeout=int(grace_s))
        for handler in self._context.subprocess_handlers.values():
            # torch elastic closes the log files of the ranks that it stopped, not of those that ended by themselves.
            for log in (handler._stdout, handler._stderr):
                if log is not None:
                    log.close()
        self._board.close()

    def _start(self, job: ProcessJob, world_size: int) -> SubprocessContext:
        common = variables(
            job,
            attempt=self.folder.number,
            world_size=world_size,
            address=_LOOPBACK,
            port=self._store.port,
            interface="lo",
        )
        common |= {
            "LOCAL_WORLD_SIZE": str(world_size),
            LAUNCHER_PID: str(os.getpid()),
            HEARTBEATS_FILE: str(self.folder.path / "heartbeats"),
        }
        ranks = range(world_size)
        with _keep_signal_handlers(), disk_errors(self.folder.path):
            context: PContext = start_processes(
                name=job.name,
                entrypoint=sys.executable,
                args=dict.fromkeys(ranks, arguments(job)),
                envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
                logs_specs=_RankLogs(self.folder),
            )
        assert isinstance(context, SubprocessContext), "an entry point that is a command runs as subprocesses"
        return context


class _RankLogs(LogsSpecs):
    """Puts each rank's output, report and stacks into its folder."""

    def __init__(self, folder: AttemptFolder) -> None:
        super().__init__(log_dir=str(folder.path))
        self._folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self._folder.path)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Prepares the folders, and tells each rank where its report and stacks go."""
        destination = LogsDest()
        for rank, env in envs.items():
            env.update(self._folder.prepare(rank))
            destination.stdouts[rank] = str(self._folder.output(rank))
            destination.stderrs[rank] = str(self._folder.log(rank))
            destination.error_files[rank] = str(self._folder.report(rank))
        return destination


def _open_store() -> TCPStore:
    """A new key-value store on a free port of the loopback interface. It closes with the object."""
    listener = socket.create_server((_LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    return TCPStore(
        _LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )


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
